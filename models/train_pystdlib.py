"""Train the decoder of ``models/pystdlib`` on the Python standard library's own sources.

``python -m qcompiler.models.train_pystdlib --out DIR`` gathers the sources of the running Python, splits them
by module, learns a tokenizer, trains, and writes ``model.safetensors`` (float16), ``config.json``,
``tokenizer.json``, ``heldout.json`` and ``training_log.csv`` to DIR. It needs a CPU and no network. Everything
random is seeded; the result is the same on the same machine, Python and PyTorch unless ``--minutes`` cuts it.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from qcompiler.models import scoring, stdlib_corpus, tokenizer
from qcompiler.models.decoder import Decoder, DecoderConfig
from qcompiler.models.ngram import BigramModel

__all__ = ["Corpus", "gather", "main", "save_model", "train"]


@dataclass(frozen=True)
class Corpus:
    """The tokenized split: one int64 ``[N]`` stream per training module, and one of all held-out modules."""

    tokenizer: tokenizer.Tokenizer
    training: list[scoring.IdArray]
    heldout: scoring.IdArray
    training_bytes: int
    heldout_bytes: int

    @property
    def token_bytes(self) -> scoring.IdArray:
        """Byte length of each token, int64 ``[V]``; 0 for the start mark."""
        ids = range(self.tokenizer.vocab_size)
        return np.array([len(self.tokenizer.decode_bytes([value])) for value in ids], dtype=np.int64)


def gather(vocab_size: int, root: str | Path | None = None) -> Corpus:
    """Read, split and tokenize the library under ``root`` (the running Python's by default)."""
    training = stdlib_corpus.training_texts(root)
    heldout = stdlib_corpus.heldout_texts(root)
    codec = tokenizer.train(training.values(), vocab_size)
    streams = [np.array([codec.bos, *codec.encode(text)], dtype=np.int64) for text in training.values()]
    marked = [value for text in heldout.values() for value in (codec.bos, *codec.encode(text))]
    sizes = [sum(len(text.encode()) for text in texts.values()) for texts in (training, heldout)]
    return Corpus(codec, streams, np.array(marked, dtype=np.int64), sizes[0], sizes[1])


def _batches(streams: list[scoring.IdArray], window: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield int64 ``[batch, window + 1]`` for ever: each epoch joins the modules in a new order and offset."""
    rng = np.random.default_rng(seed)
    while True:
        joined = np.concatenate([streams[index] for index in rng.permutation(len(streams))])
        rows = scoring.windows(np.roll(joined, int(rng.integers(len(joined)))), window)
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - batch + 1, batch):
            yield torch.from_numpy(rows[order[start : start + batch]])


def _optimizer(model: Decoder, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norm weights alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def _logits_fn(forward: Callable[[Tensor], Tensor]) -> scoring.LogitsFn:
    """Wrap a torch forward as the numpy callable that scoring takes."""

    def call(ids: scoring.IdArray) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        with torch.inference_mode():
            logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = forward(torch.from_numpy(ids)).numpy()
        return logits

    return call


def save_model(model: Decoder, path: str | Path) -> None:
    """Write the weights to ``path`` as float16 safetensors; a tied head is stored once."""
    tensors = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    save_file(tensors, path)


def train(config: DecoderConfig, corpus: Corpus, options: argparse.Namespace) -> Decoder:
    """Train a decoder on ``corpus`` and write the log and the weights to ``options.out`` as it goes."""
    torch.manual_seed(options.seed)
    model = Decoder(config)
    forward = torch.compile(model) if options.compile else model
    optimizer = _optimizer(model, options.rate, options.decay)
    batches = _batches(corpus.training, options.window, options.batch, options.seed)
    sample_rows = scoring.windows(corpus.heldout, options.window, options.eval_windows)
    log_path = options.out / "training_log.csv"
    began, running = time.monotonic(), 0.0
    with log_path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["step", "tokens", "seconds", "rate", "train_loss", "heldout_loss"])
        step, done = 0, 0.0
        while done < 1.0:
            rate = options.rate * min(1.0, (step + 1) / options.warmup) * (1.0 - done)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = next(batches)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not options.full_precision):
                logits = forward(rows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
            step += 1
            seconds = time.monotonic() - began
            limit = seconds / (60 * options.minutes) if options.minutes else 0.0
            done = max(step / options.steps, limit)
            if step % options.every == 0 or done >= 1.0:
                heldout = scoring.score_windows(_logits_fn(model), sample_rows, corpus.token_bytes)
                tokens = step * rows.shape[0] * options.window
                row = [step, tokens, round(seconds), f"{rate:.3g}", f"{running:.4f}"]
                row.append(f"{heldout.nats_per_token:.4f}")
                writer.writerow(row)
                handle.flush()
                print(*row, flush=True)
                save_model(model, options.out / "model.safetensors")
    return model


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the standard-library decoder.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument("--minutes", type=float, help="finish within this time, decaying the rate sooner")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--window", type=int, default=256, help="tokens per window")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    parser.add_argument("--warmup", type=int, default=150, help="steps of rising learning rate")
    parser.add_argument("--every", type=int, default=200, help="steps between log rows and checkpoints")
    parser.add_argument("--eval-windows", type=int, default=64, help="held-out windows in a log row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--full-precision", action="store_true", help="no bfloat16 autocast")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the whole recipe; the exit status is 0."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    config = DecoderConfig()
    corpus = gather(config.vocab_size)
    corpus.tokenizer.save(options.out / "tokenizer.json")
    (options.out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    rows = scoring.windows(corpus.heldout, options.window)
    bigram = BigramModel(corpus.training, config.vocab_size)
    baseline = scoring.score_windows(lambda ids: bigram.log_probs[ids], rows, corpus.token_bytes)
    print(f"bigram: {baseline.nats_per_token:.4f} nats/token, {baseline.bits_per_byte:.4f} bits/byte", flush=True)
    model = train(config, corpus, options).eval()
    result = scoring.score_windows(_logits_fn(model), rows, corpus.token_bytes)
    print(f"model: {result.nats_per_token:.4f} nats/token, {result.bits_per_byte:.4f} bits/byte")
    record = {
        "modules": list(stdlib_corpus.HELDOUT_MODULES),
        "window": options.window,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "training": {"bytes": corpus.training_bytes, "tokens": sum(map(len, corpus.training))},
        "heldout": {"bytes": corpus.heldout_bytes, "tokens": len(corpus.heldout), "scored": result.tokens},
        "nats_per_token": {"model": result.nats_per_token, "bigram": baseline.nats_per_token},
        "bits_per_byte": {"model": result.bits_per_byte, "bigram": baseline.bits_per_byte},
    }
    (options.out / "heldout.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
