"""Peak memory of packing small and large text, and packing that is killed and started again.

Lines of synthetic text are read as a stream. Each packing is its own process; the full scale packs
0.2 and 1 GB, which takes minutes and some 3 GB of disk, freed at the end.
"""

import filecmp
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import suite

_CHILD = """
import json, sys, time, zlib
from logitjax import data
from logitjax.data import _examples

class Words:
    vocab_size, bos_id, eos_id, pad_id, fingerprint = 32_000, None, 1, 0, "words"
    def encode(self, text, add_bos=False):
        return [2 + zlib.crc32(word) % 31_998 for word in text.encode().split()]

source, directory, _examples._HELD_CHARACTERS = *sys.argv[1:3], int(sys.argv[3])
start = time.perf_counter()
packed = data.pack_splits(source, {"model": Words()}, seq_len=512, directory=directory)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
rows = len(packed.splits["train"])
print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start, "rows": rows}))
"""


def _write(path: Path, size: int) -> None:
    words = np.array([f"w{i:x}" for i in range(20_000)])
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(words, 400)) for _ in range(1000))
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    with path.open("w") as file:
        while file.tell() < size:
            file.writelines(lines)


def _start(source: Path, directory: Path, memory: int) -> subprocess.Popen:
    command = [sys.executable, "-c", _CHILD, f"jsonl:{source}", str(directory), str(memory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _equal(one: Path, other: Path) -> bool:
    names, others = (
        sorted(path.relative_to(root) for path in root.rglob("*.array_record"))
        for root in (one, other)
    )
    same, _, _ = filecmp.cmpfiles(one, other, names, shallow=False)
    return same == names == others


def run(options: suite.Options) -> suite.Result:
    """Packs both sizes whole, then the smaller one again, killed halfway."""
    root = options.directory
    root.mkdir(parents=True, exist_ok=True)
    # Both sizes are streamed, even if they are small.
    sizes, stored = ((5e6, 2.5e7), 10**6) if options.smoke else ((2e8, 1e9), 1 << 25)
    rows, peaks, seconds = list[dict[str, Any]](), [], []
    for size in sizes:
        source = root / f"{size:.0f}.jsonl"
        _write(source, int(size))
        record = json.loads(
            _start(source, root / f"{size:.0f}", stored).communicate()[0].splitlines()[-1]
        )
        peaks.append(record["peak"])
        seconds.append(record["seconds"])
        row = {"text, MB": round(size / 1e6), "rows": record["rows"]}
        row |= {"peak, MB": round(record["peak"] / 1e6, 1), "seconds": round(record["seconds"], 1)}
        rows.append(row)
    small, source = root / f"{sizes[0]:.0f}", root / f"{sizes[0]:.0f}.jsonl"
    again = root / "again"
    process = _start(source, again, stored)
    time.sleep(0.8 * seconds[0])
    process.kill()
    process.wait()
    left = [p.name for p in again.rglob("*") if p.is_file()] if again.exists() else []
    _start(source, again, stored).communicate()
    equal = _equal(again, small)
    rows.append({"text, MB": "killed", "rows": f"{len(left)} files left", "equal": equal})
    for path in [*root.glob("*.jsonl"), *(p for p in root.iterdir() if p.is_dir())]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    bars = [
        suite.at_most(
            "peak of the larger over that of the smaller text", peaks[1] / peaks[0], 1.05
        ),
        suite.at_most("peak, GB", peaks[1] / 1e9, 2.0),
        suite.at_least("killed packing: share of files equal, bit for bit", float(equal), 1.0),
    ]
    return suite.Result(rows=rows, bars=bars)
