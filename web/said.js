// Shows on a node what it says: the `said` of its outputs, which nodes/notices.py returns.
//
// The page's own texts of a running node are taken as HTML by one version and go away with the end of the run in
// another. This is plain text, in which Markdown's tables are tables, and it stays until the node says something else.

import { app } from "../../scripts/app.js";

const WIDGET = "said";
const LINE = 16; // pixels a line of 12 pixels takes
const LETTER = 6.5; // pixels a letter takes, on average
const MOST_LINES = 14; // the rest is scrolled to
const RULE = /^[|:\s-]+$/; // between the head of a table and its rows

function height(node, text) {
  const letters = Math.max(10, Math.floor((node.size[0] - 40) / LETTER));
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)) * tall(line), 0);
  return LINE * Math.min(lines, MOST_LINES) + 28; // with the margin that the page takes off
}

// Of a line of text, in lines: a row of a table has a border, and space above and below.
const tall = (line) => (!line.startsWith("|") ? 1 : RULE.test(line) ? 0 : 1.5);

function fill(element, text) {
  element.replaceChildren();
  let table;
  for (const line of text.split("\n")) {
    if (!line.startsWith("|")) {
      const last = element.lastChild;
      if (last?.nodeType === Node.TEXT_NODE) last.data += `\n${line}`;
      else element.append(line);
      table = undefined;
    } else if (!RULE.test(line)) {
      const kind = table ? "td" : "th";
      table ??= element.appendChild(tableOf());
      const row = table.insertRow();
      for (const text of line.slice(1, -1).split(/(?<!\\)\|/)) {
        const cell = row.appendChild(document.createElement(kind));
        cell.textContent = text.trim().replaceAll("\\|", "|");
        Object.assign(cell.style, { border: "1px solid var(--border-color)", padding: "3px 6px", textAlign: "left" });
      }
    }
  }
}

function tableOf() {
  const table = document.createElement("table");
  Object.assign(table.style, { borderCollapse: "collapse", margin: "2px 0", font: "inherit", overflowWrap: "normal" });
  return table;
}

function widgetOf(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found;
  const element = document.createElement("div");
  element.className = "editloss-said";
  Object.assign(element.style, {
    boxSizing: "border-box", overflow: "auto", padding: "4px 8px", whiteSpace: "pre-wrap", overflowWrap: "anywhere",
    font: `12px/${LINE}px Inter, Arial, sans-serif`, color: "var(--input-text)", userSelect: "text",
  });
  let said = "";
  const fitted = () => height(node, said);
  const widget = node.addDOMWidget(WIDGET, "editloss_said", element, {
    getValue: () => said,
    setValue: (text) => { fill(element, (said = text)); },
    getMinHeight: fitted,
    getMaxHeight: fitted,
    serialize: false,
    hideOnZoom: false,
  });
  widget.serialize = false;
  return widget;
}

function show(node, said) {
  const text = said?.join("\n");
  if (!text) return;
  widgetOf(node).value = text;
  const [width, needed] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], needed)]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "EditLoss.Said",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("EditLoss")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output?.said);
    };
  },
  // When a graph comes back with its outputs: another tab's, or one of the history.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = output?.said && app.graph.getNodeById(id);
      if (node) show(node, output.said);
    }
  },
});
