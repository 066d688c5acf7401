"""losses.py is one file that needs torch alone; editloss_core imports with torch alone; the signatures are fixed."""

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import editloss_core
from editloss_core import losses

SOURCE = Path(losses.__file__)
TREE = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 9))
REPOSITORY = Path(editloss_core.__file__).parents[1]

PUBLIC = {
    "pair_distance": {"a": ..., "b": ..., "dist": "cos", "agg": "mean"},
    "feature_match_loss": {
        "pred": ...,
        "target": ...,
        "kind": "l2",
        "agg": "mean",
        "reduction": "mean",
        "weights": None,
    },
    "contrastive_pair_loss": {"z1": ..., "z2": ..., "y": ..., "margin": 1.0, "dist": "l2"},
    "triplet_margin_loss": {"anchor": ..., "positive": ..., "negative": ..., "margin": 0.2, "dist": "cos"},
    "margin_ranking_on_distances": {"d_pos": ..., "d_neg": ..., "margin": 0.2},
    "multi_negative_ranking_loss": {"z_anchor": ..., "z_positive": ..., "z_negs": ..., "margin": 0.2},
    "info_nce_loss": {"anchor": ..., "positive": ..., "negatives": None, "temperature": 0.07},
    "loss_no_edit_identity": {"z_pred": ..., "z_gt": ..., "z_src": ..., "margin": 0.2, "dist": "cos"},
    "loss_geometry_match": {"z_pred": ..., "z_gt": ..., "kind": "l2"},
    "loss_overlay_avoidance": {"z_pred": ..., "z_gt": ..., "z_overlay": ..., "margin": 0.2, "dist": "cos"},
}


def test_every_public_loss_has_its_signature_here():
    assert set(PUBLIC) == set(editloss_core.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_signature(name):
    """These names, order and defaults come first; what is added after them has a default."""
    parameters = list(inspect.signature(getattr(losses, name)).parameters.values())
    found = {p.name: ... if p.default is p.empty else p.default for p in parameters}
    assert list(found.items())[: len(PUBLIC[name])] == list(PUBLIC[name].items())
    added = parameters[len(PUBLIC[name]) :]
    assert all(p.default is not p.empty for p in added)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[: len(PUBLIC[name])])


def test_neg_agg_of_the_negatives_is_mean():
    assert inspect.signature(losses.multi_negative_ranking_loss).parameters["neg_agg"].default == "mean"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_in_both_places(name):
    assert getattr(editloss_core, name) is getattr(losses, name)
    assert name in losses.__all__ and name in editloss_core.__all__


def test_documented():
    """Shapes, a formula or a pointer to one, what is raised, and a runnable example."""
    for name in PUBLIC:
        text = inspect.getdoc(getattr(losses, name))
        assert ">>> " in text and "Raises:" in text and "Args:" in text, name
        for parameter in inspect.signature(getattr(losses, name)).parameters:
            assert parameter in text, f"{name}: {parameter}"


# --- syntax and imports ----------------------------------------------------------------------------------------------


def test_imports_torch_and_the_standard_library_alone():
    roots = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            roots.add(node.module.split(".")[0])
    assert roots - sys.stdlib_module_names == {"torch"}


class WithoutAnnotations(ast.NodeTransformer):
    """``from __future__ import annotations`` never evaluates them."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        return ast.Assign([node.target], node.value) if node.value else None


def test_runs_on_python_3_9():
    """Parsed as 3.9 above; besides, nothing at run time that 3.10 brought."""
    first = next(node for node in TREE.body if isinstance(node, ast.ImportFrom))
    assert first.module == "__future__" and first.names[0].name == "annotations"
    types = {"Tensor", "str", "int", "float", "bool", "list", "dict", "tuple", "slice"}
    for node in ast.walk(WithoutAnnotations().visit(ast.parse(SOURCE.read_text(encoding="utf-8")))):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            for side in (node.left, node.right):
                assert not (isinstance(side, ast.Constant) and side.value is None), f"line {node.lineno}: X | None"
                assert not (isinstance(side, ast.Name) and side.id in types), f"line {node.lineno}: a union"
        if isinstance(node, ast.Call):
            keywords = {k.arg for k in node.keywords}
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert called not in ("pairwise", "anext", "aiter"), f"line {node.lineno}"
            assert not (called == "zip" and "strict" in keywords), f"line {node.lineno}: zip(strict=)"
            assert not (called == "dataclass" and keywords & {"slots", "kw_only"}), f"line {node.lineno}"


def run(code, folder):
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_copy_in_an_empty_folder_runs(tmp_path):
    shutil.copy(SOURCE, tmp_path)
    code = """
import sys
sys.path.insert(0, ".")
import doctest, torch
import losses
from losses import loss_no_edit_identity
z = torch.eye(2, requires_grad=True)
loss = loss_no_edit_identity(z, torch.eye(2).flip(0), torch.eye(2))
loss.backward()
assert abs(loss.item() - 1.2) < 1e-6 and z.grad.isfinite().all()
assert not [name for name in sys.modules if name.startswith("editloss")]
failed, tried = doctest.testmod(losses)
assert tried > 10 and not failed
print(losses.__file__)
"""
    assert Path(run(code, tmp_path).strip()).resolve().parent == tmp_path.resolve()


@pytest.mark.slow
def test_no_warning_reaches_the_user(tmp_path):
    code = f"""
import sys, warnings
sys.path.insert(0, {str(REPOSITORY)!r})
from editloss_core import losses
warnings.simplefilter("error")
for size in ((2, 8), (1, 1024, 1024)):
    z = losses.torch.ones(size, requires_grad=True)
    losses.loss_no_edit_identity(z, z.detach(), -z.detach()).backward()
print(losses.torch.numel(z) >= losses.ONE_PASS_ELEMENTS)
"""
    assert run(code, tmp_path).strip() == "True"


@pytest.mark.slow
def test_the_core_imports_with_torch_alone(tmp_path):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        if root.startswith("comfy") or root in {{
            "folder_paths", "nodes", "server", "execution", "open_clip", "timm", "transformers", "diffusers",
            "matplotlib", "PIL", "torchvision", "safetensors", "filelock", "cv2", "scipy", "hypothesis",
        }}:
            if name not in allowed:
                raise ImportError(f"blocked: {{name}}")
allowed = set()
import torch  # whatever torch itself wants, it may have
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(REPOSITORY)!r})
before = set(sys.modules)
import editloss_core
a = torch.eye(3)
assert editloss_core.loss_overlay_avoidance(a, a, a.flip(0), margin="auto") == 0
roots = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(roots - set(sys.stdlib_module_names) - {{"torch", "editloss_core"}}))
"""
    assert run(code, tmp_path).strip() == "[]"
