"""mlx-lm's answer to one prompt, token by token; the prompt's own time is not in it."""

import json
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from report import read_job


def main() -> None:
    job = read_job()
    model, _ = load_model(Path(job["model"]))
    rates = []
    for _ in range(job["rounds"]):
        tokens = generate_step(mx.array(job["prompt"]), model, max_tokens=job["new_tokens"] + 1)
        next(tokens)
        started = time.perf_counter()
        count = sum(1 for _ in tokens)
        rates.append(count / (time.perf_counter() - started))
    print("\n" + json.dumps({"tokens_per_second": max(rates)}))


if __name__ == "__main__":
    main()
