"""ComfyUI's door to the pack. The import is deferred so that tools which execute this file (pytest) need no ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI when it loads the pack."""
    from .nodes import EditLossExtension

    return EditLossExtension()
