"""The scores of the sets of layers that were tried: `layer_scores.json` and a table for the log."""

import json
import math
from dataclasses import asdict, dataclass

from simpler_distil_whisper.layers.search import ScoredLayers

BEST_IN_TABLE = 5


@dataclass(frozen=True)
class LayerScores:
    """The content of `layer_scores.json`.

    Attributes:
        teacher: path of its folder.
        encoder: the teacher's encoder layers that the student keeps.
        manifest: path of the rows that the layers were scored on.
        utterances: how many of its rows were used.
        tokens: how many label tokens each score is the mean of.
        scores: the sets of decoder layers, the best first.
    """

    teacher: str
    encoder: list[int]
    manifest: str
    utterances: int
    tokens: int
    scores: list[ScoredLayers]

    def best(self) -> list[int]:
        """Return the decoder layers that score best."""
        return list(self.scores[0].layers)

    def to_json(self) -> str:
        """Return the content of the file, in which each set of layers has a line of its own."""
        rows = []
        for layers, found_by, (kl, agreement) in self.scores:
            row = {
                "layers": layers,
                "kl": round(kl, 6) if math.isfinite(kl) else None,
                "agreement": round(agreement, 6),
                "found_by": found_by,
            }
            rows.append(json.dumps(row))
        text = json.dumps({**asdict(self), "scores": []}, indent=2)
        lines = ",\n    ".join(rows)
        return text.replace('"scores": []', f'"scores": [\n    {lines}\n  ]') + "\n"

    def table(self) -> str:
        """Return a table of the best sets and the evenly spread one."""
        total = len(self.scores)
        lines = [f"of {total} sets of decoder layers, by KL(teacher || student) per token:"]
        for rank, (numbers, found_by, (kl, agreement)) in enumerate(self.scores, 1):
            if rank <= BEST_IN_TABLE or found_by == "spread":
                layers = " ".join(map(str, numbers))
                lines.append(
                    f"{rank:5}. {kl:8.4f}  top token {agreement:4.0%}  {layers}  ({found_by})"
                )
        return "\n".join(lines)
