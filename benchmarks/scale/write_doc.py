"""Rewrite the generated tables of docs/scale.md from the measured constants; a test compares them with the page.

    .venv/bin/python benchmarks/scale/write_doc.py

Run it after calibrate.py, or after a change of the cost model.
"""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

from raysys import config, storage
from raysys.cli import build_parser
from raysys.plan import planner
from raysys.plan.workload import Constants, Workload, load_constants, load_nodes, node_type, parse_count

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
COMMAND = re.compile(r"^raysys plan .*?--markdown.*$", re.M)
MEANING = {
    "prepare_s": ("prepare, fixed", "s"),
    "prepare_s_event": ("prepare, an event", "s"),
    "raw_bytes_event": ("data folder, an event", "bytes"),
    "prepared_bytes_event": ("prepared set, an event", "bytes"),
    "step_s": ("training step, fixed", "s"),
    "encoder_s_flop": ("encoder, a flop", "s"),
    "loss_s_flop": ("full softmax, a flop", "s"),
    "sampled_s_flop": ("sampled softmax, a flop", "s"),
    "table_s_byte": ("item table, a byte moved", "s"),
    "batch_s_user": ("batch scoring, a user", "s"),
    "batch_s_flop": ("batch scoring, a flop of users x items", "s"),
    "request_s": ("a request, fixed", "s"),
    "request_s_byte": ("a request, a byte of item vectors", "s"),
    "tail": ("p99 / mean of a request", ""),
    "gemm_flops": ("matrix product, float32", "flop/s"),
    "loss_gemm_flops": ("matrix product in the type of the loss", "flop/s"),
    "stream_bytes_s": ("memory, copying", "bytes/s"),
}


def constants_table(constants: Constants) -> str:
    """Machine, constants and derived shares."""
    values = asdict(constants)
    lines = [
        f"Measured on {constants.date} at commit {constants.commit} on {constants.machine}, {constants.cores} cores.",
        "",
        "| constant | value | unit |",
        "|---|---|---|",
        *(f"| {text} | {values[name]:.3g} | {unit} |" for name, (text, unit) in MEANING.items()),
    ]
    shares = {"encoder": constants.encoder_efficiency, "full softmax": constants.loss_efficiency}
    shares |= {"sampled softmax": constants.sampled_efficiency, "batch scoring": constants.batch_efficiency}
    lines += [f"| {name}, share of the matrix product | {value:.2f} | |" for name, value in shares.items()]
    return "\n".join([*lines, f"| item table, share of the memory's speed | {constants.table_efficiency:.2f} | |"])


def checks_table(constants: Constants) -> str:
    """Predictions beside measurements."""
    lines = ["| what | size | predicted s | measured s | error | within 25% |", "|---|---|---|---|---|---|"]
    for item in constants.checks:
        met = "yes" if abs(item["error"]) <= 0.25 else "**no**"
        figures = f"{item['predicted']:.3g} | {item['measured']:.3g} | {item['error']:+.0%}"
        lines.append(f"| {item['what']} | {item['size']:g}x | {figures} | {met} |")
    return "\n".join(lines)


def predictions_table(command: str, constants: Constants) -> str:
    """What the command of the page prints."""
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    sizes = [f"{name}={parse_count(getattr(arguments, name))}" for name in ("users", "items", "events")]
    work = config.load(Workload, None, [*sizes, *arguments.overrides])
    nodes = load_nodes()
    cpu_node = node_type(nodes, arguments.prepare_node)
    return planner.markdown({name: planner.plan(work, node_type(nodes, name), cpu_node, constants) for name in arguments.node})


def render(text: str) -> str:
    """The page with its generated blocks as the constants and formulas of today give them."""
    constants = load_constants()
    command = COMMAND.search(text.replace("\\\n", " "))
    assert command, "docs/scale.md names no `raysys plan ... --markdown`"
    tables = {
        "constants": constants_table(constants),
        "checks": checks_table(constants),
        "predictions": predictions_table(command[0], constants),
    }
    return BLOCK.sub(lambda block: f"{block[1]}{tables[block[2]]}\n{block[3]}", text)


if __name__ == "__main__":
    storage.write_bytes(str(PAGE), render(PAGE.read_text()).encode())
