"""Seeded damage to JSON and to files: the same seed does the same damage."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

VALUES = [
    *(None, True, False, "", "x", "<|zh|>", "é\ud800", "a" * 1000),
    *(-1, 0, 1, 2, 3, 7, 300, 10**6, 2**31, 2**63, 10**30),
    *(0.5, 30.0, -1.5, 1e308, math.nan, math.inf),
    *([], [None], [-1], [10**9], [[0, 0]], [["a", 1]], ["x"], {}, {"a": 1}, {"": None}),
]
BYTES = [b"", b"\0", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 20_000, b"<html>"]


def damage_value(random: Random, tree: Any) -> str:
    """Change one place of a JSON tree, and return what was done."""
    container, key = random.choice(list(places_in(tree)))
    other = copy.deepcopy(random.choice(VALUES))
    value = container[key]
    action = random.choice(["replace", "replace", "replace", "remove", "wrap", "scale", "add"])
    if action == "remove":
        del container[key]
    elif action == "wrap":
        container[key] = random.choice([[value], {"value": value}, str(value), [value] * 3])
    elif action == "scale" and isinstance(value, int | float):
        container[key] = random.choice([value + 1, value - 1, value * 2, -value, float(value)])
    elif action == "add" and isinstance(container, dict):
        container[f"{key}x"] = random.choice([value, other])
    else:
        container[key] = other
    return f"{action} {key!r} (was {value!r:.40})"


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every value; of long lists only the first items."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:20])
    for key, value in list(items)[:100]:
        yield tree, key
        if isinstance(value, dict | list):
            yield from places_in(value)


def damage_json(random: Random, path: Path) -> str:
    """Change one to three places of a JSON file, and return what was done."""
    tree = json.loads(path.read_bytes())
    done = [damage_value(random, tree) for _ in range(random.choice([1, 1, 1, 2, 3])) if tree]
    path.write_text(json.dumps(tree), encoding="utf-8", errors="surrogatepass")
    return "; ".join(done)


def damage_file(random: Random, path: Path) -> str:
    """Remove, replace, cut or garble a file, and return what was done."""
    content = path.read_bytes()
    action = random.choice(["remove", "replace", "cut", "garble", "folder"])
    if action in ("remove", "folder"):
        path.unlink()
    if action == "folder":
        path.mkdir()
    elif action == "replace":
        path.write_bytes(random.choice(BYTES))
    elif action == "cut":
        path.write_bytes(content[: random.randrange(len(content) + 1)])
    elif action == "garble":
        place = random.randrange(len(content) + 1)
        path.write_bytes(content[:place] + random.randbytes(4) + content[place + 4 :])
    return action
