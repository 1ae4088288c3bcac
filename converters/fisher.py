"""How much the keys and values of every layer matter to the model's predictions.

The true Fisher information says it: the second moment of the gradient of the log-likelihood of
labels that the model itself draws. To second order it is what an error of a key or a value adds to
the KL divergence from the model's predictions.

The gradients come from one pass forward, which keeps the input of every layer on disk, and one pass
backward, in which each layer is run again from its input. So no more than one layer's weights, or
those of the head, are in memory, and the activations of a few sequences.

Letters: N sequences, T tokens in each, B sequences at a time, D hidden size, G KV heads, E key
width, V value width, M = G E + G V.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .calibration import in_precision
from .checkpoint import Source, renamed
from .clock import Clock
from .errors import InputError
from .families import Family
from .maps import AttentionMaps, attention, normalised, project, rotate, token_angles
from .memory import release
from .moments import CodingMoments, CodingTokens
from .stream import LayerStream
from .work import load, save

# The first tokens of a sequence do not count: attention sinks matter as no other token does.
SKIP = 4
# Tokens whose gradients are multiplied at a time.
TOKENS_AT_ONCE = 4096
# Tokens whose logits are in memory at a time, some four times: 2 GB for a vocabulary of 256,000.
HEAD_TOKENS = 512

Progress = Callable[[str, int, int, dict[str, Any]], None]


def fisher_moments(
    source: Source,
    family: Family,
    tokens: Int[Tensor, "N T"],
    work: Path,
    generator: torch.Generator,
    *,
    device: torch.device,
    clock: Clock,
    progress: Progress,
    skip: int = SKIP,
) -> Iterator[tuple[int, AttentionMaps, CodingMoments, CodingTokens]]:
    """Every layer's index and its moments [M, M], in float32, from the last layer to the first.

    The input of every layer lies in `work`, in float32, until the layer's moments are made: 4 N T D
    bytes a layer. For 24 sequences of 1,024 tokens and hidden size 4,096 these are 403 MB a layer,
    13 GB for 32 layers. In memory are three such tensors at most, the layer's gradients twice while
    they are put together, 8 N T M bytes, the weights of one layer or of the head, and the
    activations of some 4,096 tokens in one layer.

    Args:
        tokens: calibration sequences.
        work: the conversion's work folder.
        generator: draws the labels, on the CPU.
        progress: called as progress("importance", done, total, info): twice for every layer and
            once for the head. A layer is done when the caller asks for the next one.
        skip: so many tokens at the start of every sequence do not count.

    Raises:
        ValueError: no token is left to count.
        InputError: the model gives values that are not finite.
    """
    if not 0 <= skip < tokens.shape[1]:
        raise ValueError(f"skip={skip} leaves none of {tokens.shape[1]} tokens.")
    stream = BackwardStream(source, family, tokens, device, clock=clock)
    layers = source.config.num_hidden_layers
    total = 2 * layers + 1
    for layer in range(layers):
        save(_input_file(work, layer), stream.input())
        stream.advance(layer)
        release()
        progress("importance", layer + 1, total, {})
    gradients = stream.head_gradients(generator)
    stream.hidden = None
    progress("importance", layers + 1, total, {})
    for layer in reversed(range(layers)):
        file = _input_file(work, layer)
        found = stream.back(layer, load(file, torch.device("cpu")), gradients, skip)
        file.unlink()
        yield layer, *found
        del found  # before the next layer's are made
        release()
        progress("importance", total - layer, total, {})


class BackwardStream(LayerStream):
    """A stream that goes back through the layers it has gone through, with gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.skeleton.requires_grad_(False)

    def input(self) -> Float[Tensor, "N T D"]:
        """The input of the next layer."""
        if self.hidden is None:
            self.hidden = self._embed()
        return self.hidden

    @torch.enable_grad()
    def head_gradients(self, generator: torch.Generator) -> Float[Tensor, "N T D"]:
        """Gradients of the labels' log-likelihood with respect to the last layer's output.

        All layers must have been run. Every token has one label, drawn from what the model predicts
        to follow it.
        """
        assert self.hidden is not None
        gradients = torch.empty_like(self.hidden)
        # No more than have a position, where positions are learned.
        most = getattr(self.source.config, "max_position_embeddings", HEAD_TOKENS)
        step = min(HEAD_TOKENS, most)
        inputs, found = (x.flatten(0, 1).split(step) for x in (self.hidden, gradients))
        with self._head() as head, self.clock("importance"):
            for hidden, gradient in zip(inputs, found, strict=True):
                leaf = hidden[None].to(self.device).detach().requires_grad_()
                logits = head(leaf)
                self._check(logits, "the model's predictions are")
                predicted = logits[0].detach().float().softmax(-1)
                labels = predicted.cpu().multinomial(1, replacement=True, generator=generator)
                rows = torch.arange(len(labels), device=self.device)
                ascent = -predicted  # with respect to the logits
                ascent[rows, labels[:, 0].to(self.device)] += 1
                gradient.copy_(torch.autograd.grad(logits, leaf, ascent[None])[0][0])
        return gradients

    @contextmanager
    def _head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last layer's output [1, T, D] to logits [1, T, vocabulary].

        It runs the whole model with one layer in place of all, which gives that output. So the
        norm, the head, and a cap or scale of the logits are the model's own.
        """
        skeleton, path = self.skeleton, self.family.layers
        owner = skeleton.get_submodule(path.rpartition(".")[0])
        name, last = path.rpartition(".")[2], _Fixed()
        layers = getattr(owner, name)
        source, embeddings = renamed(self.source, type(skeleton).__name__), self._embeddings()
        with self.clock("read"):
            weights = {
                n: source.tensor(self._stored(n, source)).to(self.device, torch.float32)
                for n in skeleton.state_dict()
                if n != embeddings and not n.startswith(f"{path}.")
            }
            skeleton.load_state_dict(weights, strict=False, assign=True)
        if self.rotary is not None:
            skeleton.base_model.rotary_emb = _Fixed()  # its angles go to the layers alone
        setattr(owner, name, nn.ModuleList([last]))
        options = {"use_cache": False}
        if hasattr(skeleton.config, "output_router_logits"):
            options["output_router_logits"] = False  # there are no routers here

        def head(hidden: Tensor) -> Tensor:
            last.output = hidden
            return skeleton(inputs_embeds=hidden.detach(), **options).logits

        try:
            yield head
        finally:
            setattr(owner, name, layers)
            skeleton.to("meta")

    @torch.enable_grad()
    def back(
        self,
        layer: int,
        inputs: Float[Tensor, "N T D"],
        gradients: Float[Tensor, "N T D"],
        skip: int,
    ) -> tuple[AttentionMaps, CodingMoments, CodingTokens]:
        """The layer's maps, and its moments and their tokens in float32.

        They are of all tokens but each sequence's first `skip`, which stand in the moments by
        themselves.

        Args:
            inputs: the layer's.
            gradients: of the log-likelihood with respect to the layer's output; overwritten by
                those with respect to its input.
        """
        with self.clock("read"):
            self._attention = {}
            module = self._load(self.skeleton.get_submodule(f"{self.family.layers}.{layer}"), layer)
            source = self.maps(layer)
            maps = _Recorded(**vars(source.to(torch.float32)))
        # The maps compute what the model's attention does, and hand out keys and values.
        attends = module.get_submodule(self.family.attention)
        attends.forward = lambda hidden_states, *_, **__: (attention(maps, hidden_states), None)
        seen: list[CodingTokens] = []
        first: list[CodingTokens] = []
        with self.clock("importance"):
            for rows in self._rows():
                batch = inputs[rows].to(self.device).detach().requires_grad_()
                out = module(batch, **self._given(layer, batch, None, 0))
                out = out[0] if isinstance(out, tuple) else out
                ascent = gradients[rows].to(self.device)
                found = torch.autograd.grad(out, (batch, *maps.made[1:]), ascent)
                gradients[rows] = found[0]
                for some, tokens in ((first, slice(skip)), (seen, slice(skip, None))):
                    some.append(_tokens(maps.made[0], found[1:], tokens))
        del attends.forward
        module.to("meta")
        self._check(gradients, f"layer {layer} has gradients that are")
        counted = _together(seen)
        moments = replace(moments_of(counted), first=_together(first) if skip else None)
        return source, moments, counted

    def _check(self, values: Tensor, what: str) -> None:
        if not values.isfinite().all():
            raise InputError(
                f"{self.source.path}: {what} not finite on the calibration text. The checkpoint is "
                "damaged, or is not that of its config.json."
            )


class _Fixed(nn.Module):
    """Gives `output`, whatever it reads."""

    output: Tensor | None = None

    def forward(self, *args, **kwargs) -> Tensor | None:
        return self.output


@dataclass(frozen=True)
class _Recorded(AttentionMaps):
    """Maps that keep the inputs they read last, and their keys, before any norm, and values."""

    made: list[Tensor] = field(default_factory=list)

    def read(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T G E"], Float[Tensor, "B T G V"]]:
        self.made[:] = x, project(x, self.k, self.k_bias), project(x, self.v, self.v_bias)
        angles = token_angles(self.inv_freq, x)[:, None]
        keys = normalised(self.made[1], self.k_norm, self.norm_eps)
        return rotate(self.queries(x), angles), rotate(keys, angles), self.made[2]


def moments_of(seen: CodingTokens) -> CodingMoments:
    """The tokens' moments, summed in float64."""
    count = len(seen.inputs)
    inputs, gradients = (x.split(TOKENS_AT_ONCE) for x in (seen.inputs, seen.gradients))
    mean = sum(part.double().sum(0) for part in inputs) / count

    def second(parts: Sequence[Tensor], centre: Any = 0.0) -> Any:
        centred = (part.double() - centre for part in parts)
        return sum(part.mT @ part for part in centred) / count

    moments = CodingMoments(second(gradients), second(inputs, mean), mean)
    return in_precision(moments, torch.float32)


def _tokens(
    inputs: Float[Tensor, "B T D"], slopes: Sequence[Float[Tensor, "B T G _"]], chosen: slice
) -> CodingTokens:
    """Inputs, gradients of keys and values, and positions of chosen tokens of each sequence."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).float()[chosen]
    gradients = torch.cat([part[:, chosen].flatten(2) for part in slopes], dim=2)
    return CodingTokens(
        inputs.detach()[:, chosen].flatten(0, 1),
        gradients.flatten(0, 1),
        positions.repeat(len(inputs)),
    )


def _together(parts: Sequence[CodingTokens]) -> CodingTokens:
    return CodingTokens(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.gradients for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


def _input_file(work: Path, layer: int) -> Path:
    return work / f"input-{layer:04d}.pt"
