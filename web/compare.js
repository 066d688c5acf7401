// Lets the pictures of Compare Base and LoRA lie over each other with a slider, where the page has one: in Nodes 2.0.
//
// The grid of all four columns stays below it; everywhere else it is all there is.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const WIDGET = "base | LoRA";

const address = (picture) => api.apiURL(`/view?${new URLSearchParams(picture)}`);

function compare(node, output) {
  if (!output?.a_images || !LiteGraph.vueNodesMode || !app.widgets.IMAGECOMPARE) return;
  let widget = node.widgets.find((w) => w.name === WIDGET);
  if (!widget) {
    widget = app.widgets.IMAGECOMPARE(node, WIDGET, ["IMAGECOMPARE", {}], app).widget;
    widget.options.serialize = false; // the prompt has no input of this name
  }
  widget.value = { beforeImages: output.a_images.map(address), afterImages: output.b_images.map(address) };
  widget.callback?.(widget.value);
}

app.registerExtension({
  name: "EditLoss.Compare",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "EditLossCompare") return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      compare(this, output);
    };
  },
  // When a graph comes back with its outputs: another tab's, or one of the history.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(id);
      if (node?.comfyClass === "EditLossCompare") compare(node, output);
    }
  },
});
