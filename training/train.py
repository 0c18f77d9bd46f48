"""Train quill: `python -m training.train --run FOLDER --steps N`; run again to resume.

FOLDER gets the tokenizer, the encoded corpus, the checkpoint and a log of JSON lines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import Batch, Mix, Sampler, TrainingText, prepare
from training.model import Quill, QuillConfig, initialise, parameter_count
from training.schedule import make_optimizers, rate_factor, set_rates

RECALL_BUCKETS = (32, 128, 512, 1024, 2048)
"""Upper ends, in tokens, of the distance ranges recall is watched in."""
LOG_EVERY = 10
WATCH_EVERY = 100
WATCH_ROWS = 4
GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Settings:
    """What one run does; sizes in tokens, rates per step."""

    run: Path
    steps: int
    short_steps: int
    decay_share: float
    batch: int
    short_length: int
    length: int
    optimizer: str
    matrix_rate: float
    other_rate: float
    mix: Mix
    seed: int
    save_every: int
    compile: bool

    def length_at(self, step: int) -> int:
        """Row length of a step: short rows first, which are cheaper, then full ones."""
        return self.short_length if step < self.short_steps else self.length


def parse_settings() -> Settings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--steps", type=int, default=2400, help="total; may change on resuming")
    parser.add_argument("--short-steps", type=int, default=900, help="steps of short rows")
    parser.add_argument("--decay-share", type=float, default=0.25, help="of the steps, the last")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--short-length", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--matrix-rate", type=float, default=6e-3, help="peak rate of Muon")
    parser.add_argument("--other-rate", type=float, default=4e-3, help="peak rate of AdamW")
    parser.add_argument("--recall", type=float, default=Mix.recall, help="share of recall rows")
    parser.add_argument("--dense", type=float, default=Mix.dense, help="share of them dense")
    parser.add_argument("--answer-weight", type=float, default=Mix.answer_weight)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = vars(parser.parse_args())
    shares = {name: options.pop(name) for name in ("recall", "dense", "answer_weight")}
    mix = replace(Mix(), **shares)
    return Settings(compile=not options.pop("eager"), mix=mix, **options)


class Trainer:
    """The state of a run, and how one step changes it."""

    def __init__(self, settings: Settings, text: TrainingText) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Quill(QuillConfig(max_position_embeddings=settings.length))
        initialise(model, settings.seed)
        self.model = model.to(self.device)
        self.optimizers = make_optimizers(
            self.model, settings.optimizer, settings.matrix_rate, settings.other_rate
        )
        self.sampler = Sampler(text, settings.mix, settings.seed)
        self.watcher = Sampler(text, Mix(recall=1.0), settings.seed + 1)
        self.loss: Callable[[Tensor, Tensor, Tensor], Tensor] = self.model.loss
        if settings.compile:
            self.loss = torch.compile(self.model.loss, dynamic=False)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.changes = [self.mix_from_here()]
        self.log = settings.run / "log.jsonl"
        self.checkpoint = settings.run / "checkpoint.pt"

    def resume(self) -> None:
        """Take up the run's checkpoint, if it has one."""
        if not self.checkpoint.exists():
            return
        state = load_checkpoint(self.checkpoint)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = state["progress"]
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.seconds = progress["seconds"]
        self.changes = progress["changes"]
        here = self.mix_from_here()
        if self.changes[-1] | {"step": self.step} != here:
            self.changes.append(here)
        print(f"resumed at step {self.step}", flush=True)

    def mix_from_here(self) -> dict[str, float]:
        """The mix in force from the present step on, for the record."""
        return {"step": self.step} | asdict(self.settings.mix)

    def save(self) -> None:
        """Write the checkpoint."""
        described = asdict(self.settings) | {"run": self.settings.run.name}
        progress = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "changes": self.changes,
            "settings": described,
        }
        save_checkpoint(self.checkpoint, self.model, self.optimizers, progress)

    def batch(self, sampler: Sampler, step: int, tokens: int) -> Batch:
        """Batch of a step on the device, of the step's row length."""
        length = self.settings.length_at(step)
        made = sampler.batch(step, max(1, tokens // length), length)
        parts = (made.ids, made.targets, made.weights, made.distances)
        return Batch(*(part.to(self.device) for part in parts))

    def train_step(self) -> Tensor:
        """One step of the optimizers; returns the loss in nats, weighted."""
        settings = self.settings
        set_rates(self.optimizers, rate_factor(self.step, settings.steps, settings.decay_share))
        batch = self.batch(self.sampler, self.step, settings.batch)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss(batch.ids, batch.targets, batch.weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.ids.numel()
        return loss.detach()

    @torch.no_grad()
    def watch(self) -> dict[str, float]:
        """Loss in nats on library tokens of fresh recall rows, and recall by distance range."""
        length = self.settings.length_at(self.step)
        batch = self.batch(self.watcher, self.step, WATCH_ROWS * length)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            guess = self.model(batch.ids).argmax(-1)
        seen: dict[str, float] = {}
        low = 1
        for high in RECALL_BUCKETS:
            here = (batch.distances >= low) & (batch.distances <= high)
            if here.any():
                right = (guess == batch.targets)[here].float().mean().item()
                seen[f"recall_{low}_{high}"] = round(right, 3)
            low = high + 1
        return seen

    def fit(self) -> None:
        """Train to the last step."""
        settings = self.settings
        print(f"{parameter_count(self.model):,} parameters on {self.device}", flush=True)
        summed = torch.zeros((), device=self.device)
        before, tokens_before, since = time.monotonic(), self.tokens, self.step
        while self.step < settings.steps:
            summed += self.train_step()
            last = self.step == settings.steps
            if self.step % LOG_EVERY == 0 or last:
                now = time.monotonic()
                self.seconds += now - before
                speed = (self.tokens - tokens_before) / (now - before)
                self.report(summed.item() / (self.step - since), speed)
                before, tokens_before, since = now, self.tokens, self.step
                summed.zero_()
            if self.step % settings.save_every == 0 or last:
                self.save()

    def report(self, loss: float, speed: float) -> None:
        """Print and log progress; speed in tokens per second."""
        left = (self.settings.steps - self.step) * self.settings.batch / speed / 60
        entry: dict[str, Any] = {
            "step": self.step,
            "loss": round(loss, 4),
            "tokens_per_second": round(speed),
            "minutes": round(self.seconds / 60, 2),
        }
        if self.step % WATCH_EVERY == 0:
            entry |= self.watch()
        shown = "  ".join(f"{key} {value}" for key, value in entry.items())
        print(f"{shown}  eta {left:.1f} min", flush=True)
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    """Prepare the data, resume if there is something to resume, train."""
    settings = parse_settings()
    torch.manual_seed(settings.seed)
    trainer = Trainer(settings, prepare(settings.run))
    trainer.resume()
    trainer.fit()


if __name__ == "__main__":
    main()
