"""Write `docs/configuration.md`: every key of every config, from the classes that read it.

Run it as `python docs/configuration.py` when a key, a default or a description has changed.
"""

import importlib
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from simpler_distil_whisper.config import ExplainedKey, explained_keys  # noqa: E402

PAGE = REPOSITORY / "docs" / "configuration.md"
COMMANDS = {
    "run_pseudo_labelling": "python run_pseudo_labelling.py run_pseudo_labelling.json",
    "create_student_model": "python create_student_model.py create_student_model.json",
    "run_distillation": "python run_distillation.py run_distillation.json",
    "offline_inference": "python offline_inference.py offline_inference.json",
    "eval": "python eval.py eval.json",
    "export": "python -m simpler_distil_whisper.export export.json",
}
MODULES = {"export": "simpler_distil_whisper.export.__main__"}
INTRODUCTION = """\
# Configuration

Every key of the six JSON files. `python docs/configuration.py` writes this page from the classes
that read them; `--help` of a script shows the same table.

- A required key must be there. Every other key may be left out; the log then names the default.
- Paths are relative to the working directory. Audio paths inside a manifest are tried from the
  manifest's folder first.
- Ratios go from 0 to 1. Units end a name: `_seconds`, `_steps`, `_gigabytes`.
- What `null` does stands with each key; it switches a section off that has a key `enabled`.
  `"auto"` is chosen from device, model, data or labels: what, stands in the log or in
  `run_info.json`.
- An unknown, misspelt, duplicate, missing or ill-typed key ends a script with exit code 2, with
  every problem in one message. Keys of earlier projects are answered with the new name.
- A default is not always the value in the shipped file, so a key that is left out can change the
  recipe. The shipped values are the recommended ones, but for paths, the columns and rows that
  `eval.json` and `export.json` name, batch sizes and how often something is logged and saved: those
  suit the demo. They differ in `student.decoder_layers` (left out, nothing is pruned),
  `sampled_texts.count`, `data.sampled_text_probability`, `data.max_error_rate`,
  `objective.cross_entropy_weight`, `freeze.embed_tokens`, `augmentation`, for inference
  `decoding.temperatures` and, in `eval.json`, `hallucination.phrases`.
"""


def rows(script: str) -> list[ExplainedKey]:
    """Return the keys of a script's config."""
    return explained_keys(importlib.import_module(MODULES.get(script, script)).Config)


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for script, command in COMMANDS.items():
        parts.append(f"## {script}.json\n\n```sh\n{command}\n```\n")
        lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, default, meaning in rows(script):
            shown = "required" if default is None else f"`{default}`"
            cells = map(_in_cell, (f"`{key}`", kind, shown, meaning))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _in_cell(text: str) -> str:
    """Return a text of which no sign ends a cell of a table or begins a tag of HTML."""
    return re.sub(r"<(?=[A-Za-z/])", "&lt;", text.replace("|", "\\|"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
