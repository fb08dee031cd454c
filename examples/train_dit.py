"""Training run of a small video DiT on a published latent set: weights, samples as mp4 and PNG, a loss curve.

    python -m examples.train_dit OUTPUT[@snapshot] RUN
    torchrun --nproc-per-node 2 -m examples.train_dit OUTPUT[@snapshot] RUN

The same command continues after a kill, on any number of processes: batches, noise, times and dropped captions depend on (seed, step, id)
and never on the rank. On one process on a CPU the result equals that of a run that was not killed bit for bit; on
several processes or a GPU, to rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import IO, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from examples import pictures
from examples.dit import PADDING, DiT, DiTConfig, caption_words
from examples.flow import Denoiser, draw, flow_loss, sample
from examples.training_state import AveragedWeights, Ranks, RunFolder, joined_ranks
from pipeline import LatentDataset, LatentLoader
from pipeline.errors import ConfigError, LatheError, TrainingError
from pipeline.loader.batch import Batch


def flag_of(name: str) -> str:
    """Command-line option of a field of `Options`."""
    return "--" + name.replace("_", "-")


def option(default: Any, text: str, least: int | None = None) -> Any:
    """A field of `Options` with the help text of its command-line option and, if it is a number, the least that is accepted."""
    return field(default=default, metadata={"help": text, "least": least})


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a run. Those in `FREE` may change when it continues."""

    output: str
    run: str
    steps: int = option(1000, "steps in all", least=1)
    batch: int = option(16, "latents of a step, over all processes", least=1)
    width: int = option(192, "values of a token", least=1)
    depth: int = option(6, "transformer blocks", least=0)
    heads: int = option(6, "attention heads; width is a multiple of 16 x heads", least=1)
    patch: int = option(2, "latent rows and columns of a token", least=1)
    learning_rate: float = option(1e-3, "of AdamW, after the warm-up", least=0)
    warmup: int = option(20, "steps in which the rate rises; 0: none", least=0)
    weight_decay: float = option(0.01, "of AdamW", least=0)
    clip: float = option(1.0, "largest norm of the gradient", least=0)
    average: float = option(0.99, "decay of the averaged weights", least=0)
    caption_dropout: float = option(0.1, "fraction of captions left out", least=0)
    text: str = option("", "sidecar set of text embeddings that `lathe embed` made; without it words are hashed")
    known: Literal["nothing", "first_frame", "i2v_cond"] = option(
        "nothing",
        "of the latents, for image to video: first_frame: the first latent frame; i2v_cond: the stored condition",
    )
    normalize: Literal["model", "none"] = option("model", "model: by the network's constants; none: latents as stored")
    seed: int = option(0, "of weights, order, noise and times", least=0)
    checkpoint_every: int = option(200, "steps between checkpoints", least=1)
    samples: int = option(6, "videos sampled at the end; 0: none", least=0)
    log_ids: bool = option(False, "log the ids of every step")

    def __post_init__(self) -> None:
        for item in fields(self):
            least, value = item.metadata.get("least"), getattr(self, item.name)
            if least is not None and not value >= least:  # also NaN
                raise ConfigError(f"{flag_of(item.name)}: expected at least {least}, got {value}")
        if self.width % (16 * self.heads):
            raise ConfigError(
                f"--width: expected a multiple of 16 x --heads, which is {16 * self.heads}, got {self.width}"
            )
        if self.known not in ("nothing", "first_frame", "i2v_cond"):
            raise ConfigError(f"--known: expected nothing, first_frame or i2v_cond, got {self.known!r}")


FREE = {"output", "run", "steps", "checkpoint_every", "samples", "log_ids"}


def train(options: Options) -> None:
    """Runs the steps that `options.run` does not have yet. Call it in every process of the group.

    Raises:
        LatheError: no snapshot, a batch that the processes cannot share, latents that the patch does not divide, a run folder
            with other settings.
    """
    with joined_ranks() as ranks:
        dataset = LatentDataset.open(options.output, columns=("i2v_cond",) if options.known == "i2v_cond" else ())
        check_patch(dataset, options.patch)
        loader = LatentLoader(
            dataset,
            batch=options.batch,
            dp_rank=ranks.rank,
            dp_world=ranks.world,
            caption_dropout=options.caption_dropout,
            **loading(options, ranks.device),
        )
        files = RunFolder(options.run)
        files.path.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(options, ranks, files, dataset.spec.latent_channels, text_width(dataset, options))
        with closing(loader):
            trainer.resume(loader)
            loader.check_ranks()
            trainer.run(loader)
        if ranks.rank == 0:
            pictures.write_loss_curve(files.path / "loss.png", files.read_log())
            if options.samples:
                trainer.show(dataset)
        ranks.gather(None)  # all wait for the pictures


def check_patch(dataset: LatentDataset, patch: int) -> None:
    """Raises ConfigError if latents of a bucket cannot be divided into tokens."""
    side = dataset.spec.space_stride * patch
    if odd := [name for name in dataset.buckets if any(int(size) % side for size in name.split("x")[1:])]:
        raise ConfigError(
            f"--patch {patch}: expected frames of multiples of {side} pixels, got buckets {', '.join(odd)}"
        )


def loading(options: Options, device: torch.device) -> dict[str, Any]:
    """Arguments of a loader that decide what a batch of this run holds."""
    return {
        "seed": options.seed,
        "normalize": options.normalize,
        "device": device,
        "dtype": torch.float32,
        "sidecars": (options.text,) if options.text else (),
    }


def text_width(dataset: LatentDataset, options: Options) -> int:
    """Values of a text embedding of the sidecar set; 0 without one."""
    if not options.text:
        return 0
    with closing(LatentLoader(dataset, batch=1, sidecars=(options.text,))) as loader:
        (embedding_LE,) = next(iter(loader)).sidecars[options.text.partition("@")[0]]["embedding"]
    return int(embedding_LE.shape[-1])


def knowing(network: nn.Module, known_BCTHW: Tensor | None) -> Denoiser:
    """The network with what is known of the latents."""
    return lambda noisy_BCTHW, time_B, text: network(noisy_BCTHW, time_B, text, known_BCTHW)


class Trainer:
    """Network, optimizer and averaged weights in one process of a run, and its step number."""

    def __init__(self, options: Options, ranks: Ranks, files: RunFolder, channels: int, text: int = 0) -> None:
        """`channels`: of latents. `text`: values of a text embedding, 0 for hashed words."""
        self.options, self.ranks, self.files, self.step = options, ranks, files, 0
        patch = (1, options.patch, options.patch)
        known = 0 if options.known == "nothing" else channels + 1
        self.config = DiTConfig(
            channels, options.width, options.depth, options.heads, patch, text_width=text, known_channels=known
        )
        torch.manual_seed(options.seed)
        self.network = DiT(self.config).to(ranks.device)
        self.average = AveragedWeights(self.network, options.average)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, betas=(0.9, 0.95)
        )
        self.shared: nn.Module = self.network
        if ranks.world > 1:
            self.shared = DistributedDataParallel(self.network)

    def resume(self, loader: LatentLoader) -> None:
        """Takes the state of the checkpoint, if there is one."""
        state = self.files.load(self._settings())
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values = {name: value.to(self.ranks.device) for name, value in state["average"].items()}
            loader.load_state_dict(state["loader"])
            self.step = state["step"]
        if self.ranks.rank == 0:
            self.files.cut_log(self.step)

    def run(self, loader: LatentLoader) -> None:
        """Trains up to `options.steps`, with a checkpoint now and then and at the end."""
        if self.step >= self.options.steps:
            return
        with open(self.files.log, "a", encoding="utf-8") if self.ranks.rank == 0 else nullcontext() as log:
            for batch in loader:
                began = time.perf_counter()
                latents_BCTHW = cast(Tensor, batch.latents)  # a list only with `Pack`
                values = self.learn(latents_BCTHW, batch.ids, self._text(batch), self._known(batch))
                values |= {"bucket": batch.bucket, "seconds": time.perf_counter() - began}
                if self.options.log_ids:
                    values["ids"] = [name for part in self.ranks.gather(list(batch.ids)) for name in part]
                if log is not None:
                    self._log(log, values)
                last = self.step == self.options.steps
                if self.ranks.rank == 0 and (last or self.step % self.options.checkpoint_every == 0):
                    self.files.save(self._state(loader))
                if last:
                    break

    def learn(
        self, latents_BCTHW: Tensor, ids: Sequence[str], text: Tensor, known_BCTHW: Tensor | None = None
    ) -> dict[str, Any]:
        """One step on this rank's share of a batch. Gradients are averaged over ranks, whose shares are equal. Returns values to log."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (self.step + 1) / max(1, options.warmup))
        noise_BCTHW, time_B = draw(options.seed, self.step, ids, latents_BCTHW)
        with self._low_precision():
            loss = flow_loss(knowing(self.shared, known_BCTHW), latents_BCTHW, text, noise_BCTHW, time_B)
        loss.backward()
        length = nn.utils.clip_grad_norm_(self.network.parameters(), options.clip)
        mean = self.ranks.mean(loss)
        if not torch.isfinite(length):
            raise TrainingError(
                f"step {self.step + 1}: loss {mean}, gradient norm {float(length)}, expected finite numbers; "
                "lower --learning-rate and start in another run folder"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.network, self.step)
        return {"step": self.step, "loss": mean, "gradient": float(length)}

    def show(self, dataset: LatentDataset) -> None:
        """Samples videos with the captions of stored latents, and shows them below these."""
        options = self.options
        stored, empty = (self._first_rows(dataset, dropout) for dropout in (0.0, 1.0))
        stored_BCTHW = cast(Tensor, stored.latents)
        network = DiT(self.config).to(self.ranks.device).eval()
        network.load_state_dict(self.average.values)
        known_BCTHW = self._known(stored)
        both_BCTHW = None if known_BCTHW is None else known_BCTHW.repeat(2, 1, 1, 1, 1)  # with and without captions
        text = self._text(stored)
        with self._low_precision():
            found = sample(knowing(network, both_BCTHW), text, self._text(empty, like=text), stored_BCTHW.shape[1:])
        decoder = pictures.SampleDecoder(dataset, str(self.ranks.device))
        normalized = options.normalize == "model"
        samples = [decoder.video(latent, normalized=normalized) for latent in found]
        originals = [decoder.video(latent, normalized=normalized) for latent in stored_BCTHW]
        pictures.write_samples(self.files.path, samples, originals, stored.captions, float(stored.fps[0]))

    def _first_rows(self, dataset: LatentDataset, dropout: float) -> Batch:
        loader = LatentLoader(
            dataset,
            batch=self.options.samples,
            shuffle="none",
            drop_last=False,
            epochs=1,
            caption_dropout=dropout,
            **loading(self.options, self.ranks.device),
        )
        with closing(loader):
            return next(iter(loader))

    def _text(self, batch: Batch, like: Tensor | None = None) -> Tensor:
        """Captions as the network takes them: mean embeddings of their tokens `BE`, or words `BS`, of the length of `like` where given."""
        if self.options.text:
            tokens = batch.sidecars[self.options.text.partition("@")[0]]["embedding"]
            return torch.stack([tokens_LE.float().mean(0) for tokens_LE in tokens])
        words_BS = caption_words(batch.captions, self.config.vocabulary).to(self.ranks.device)
        return words_BS if like is None else F.pad(words_BS, (0, like.shape[1] - words_BS.shape[1]), value=PADDING)

    def _known(self, batch: Batch) -> Tensor | None:
        """What is known of the latents of a batch, with a channel that is 1 where it holds: their first frame."""
        latents_BCTHW = cast(Tensor, batch.latents)
        where_B1THW = torch.zeros_like(latents_BCTHW[:, :1])
        where_B1THW[:, :, 0] = 1
        if self.options.known == "nothing":
            return None
        values_BCTHW = batch.i2v_cond if self.options.known == "i2v_cond" else latents_BCTHW * where_B1THW
        return torch.cat([cast(Tensor, values_BCTHW), where_B1THW], dim=1)

    def _low_precision(self) -> Any:
        """bfloat16 arithmetic on GPUs that have it; weights and optimizer stay float32."""
        cuda = self.ranks.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.options).items() if name not in FREE}

    def _state(self, loader: LatentLoader) -> dict[str, Any]:
        return {
            "step": self.step,
            "settings": self._settings(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "loader": loader.state_dict(),
        }

    def _log(self, log: IO[str], values: dict[str, Any]) -> None:
        log.write(json.dumps(values) + "\n")
        log.flush()
        if self.step % 50 == 0 or self.step == self.options.steps:
            print(f"step {self.step}: loss {values['loss']:.4f}, {values['seconds']:.2f} s", flush=True)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options of a command line."""
    parser = argparse.ArgumentParser(
        prog="train_dit", description="Trains a small video diffusion transformer on a published latent set."
    )
    parser.add_argument(
        "output", help="folder or s3://bucket/prefix that `lathe publish` wrote; OUTPUT@3 for snapshot 3"
    )
    parser.add_argument("run", help="folder of this run; an earlier run in it continues")
    for item in fields(Options)[2:]:
        flag, text = flag_of(item.name), item.metadata["help"]
        if isinstance(item.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=type(item.default), default=item.default, help=f"{text} [{item.default}]")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Command line."""
    try:
        train(parse())
    except LatheError as error:
        print(f"train_dit: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
