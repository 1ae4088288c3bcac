"""The source model run layer by layer, with one layer's weights in memory.

Letters: N sequences, T tokens in each, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ..modeling.cached_decoding import cache_argument
from .activations import Activations
from .checkpoint import Source
from .clock import Clock
from .errors import InputError
from .families import Family, layer_kind, window
from .maps import AttentionMaps, visible

# Tokens sent through a layer at a time.
TOKENS_AT_ONCE = 4096

OnTensor = Callable[[str, Tensor], object]


def ignore(name: str, tensor: Tensor) -> None:
    """Does nothing with the tensor."""


@dataclass
class LayerStream:
    """Runs sequences through the source, a layer at a time.

    Args:
        source: the checkpoint.
        family: where it keeps its layers.
        tokens: calibration sequences.
        device: where the layers run.
        low_precision: matrix products in bfloat16; the residual stream stays in float32.
        clock: counts the seconds of "read" and "forward".
        on_tensor: called with the name and every tensor, as it is stored, that is read of a layer
            beside its attention.
        hidden: the residual stream entering the next layer; None before the first.
        decoded: what attention gave when the last `advance` decoded tokens, [decode, D].
    """

    source: Source
    family: Family
    tokens: Int[Tensor, "N T"]
    device: torch.device
    low_precision: bool = False
    clock: Clock = field(default_factory=Clock, repr=False)
    on_tensor: OnTensor = field(default=ignore, repr=False)
    hidden: Float[Tensor, "N T D"] | None = None
    decoded: Float[Tensor, "T D"] | None = field(init=False, repr=False, default=None)
    skeleton: PreTrainedModel = field(init=False, repr=False)
    rotary: nn.Module | None = field(init=False, repr=False)
    # The attention's tensors of the layer that was run last, for its maps; None where not kept.
    _attention: dict[str, Tensor] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        config = self.source.config
        # The fused kernel caps no scores, and the plain one would round them.
        capped = self.family.softcap(config) is not None
        self.low_precision &= not capped
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=False,
                attn_implementation="eager" if capped else "sdpa",
                dtype=torch.float32,
            ).eval()
        # Built off the meta device: its frequencies are computed, not loaded.
        rotary = getattr(self.skeleton.base_model, "rotary_emb", None)
        self.rotary = None
        if rotary is not None:
            self.rotary = type(rotary)(config).to(self.device)
            # Converted models hand more than angles to their layers.
            self.rotary._forward_hooks.update(rotary._forward_hooks)
        for layer in range(config.num_hidden_layers):
            inv_freq = self.inv_freq(layer)
            if not (inv_freq.isfinite() & (inv_freq > 0)).all():
                raise InputError(
                    f"{self.source.path / 'config.json'} gives rotary frequencies that are no "
                    "finite numbers above 0 (rope_parameters)."
                )

    def inv_freq(self, layer: int) -> Float[Tensor, " R2"]:
        """Of the layer's rotated pairs; of a model without RoPE none."""
        if self.rotary is None:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        return self.rotary.get_buffer(self._of_kind(layer, "inv_freq")).double()

    def attention_factor(self, layer: int) -> float:
        """What the layer's cos and sin are multiplied with."""
        if self.rotary is None:
            return 1.0
        return float(getattr(self.rotary, self._of_kind(layer, "attention_scaling"), 1.0))

    def _of_kind(self, layer: int, name: str) -> str:
        """The rotary embedding's name for it, which can be one for each kind of layer."""
        named = f"{layer_kind(self.source.config, layer)}_{name}"
        return named if hasattr(self.rotary, named) else name

    def maps(self, layer: int) -> AttentionMaps:
        """The layer's attention, in float64; what `advance` has kept of it is not read again."""
        prefix = self.family.prefix(layer)
        config = self.source.config
        rope = self.inv_freq(layer), self.attention_factor(layer)
        with self.clock("read"):
            tensors = {
                name.removeprefix(prefix): self._of_attention(name).to(self.device)
                for name in self.source.names()
                if name.startswith(prefix) and name.removeprefix(prefix) not in self.family.buffers
            }
            return self.family.read(config, tensors, *rope, window(config, layer))

    @torch.no_grad()
    def advance(self, layer: int, keep: bool = False, decode: int = 0) -> Activations:
        """Runs one layer, which must be the next one, and says what its attention saw and did.

        Args:
            keep: the attention's tensors, for `maps`.
            decode: so many tokens at the end of the first sequence are also run one by one, with
                the tokens before them in a cache, for `decoded`.
        """
        with self.clock("read"):
            if self.hidden is None:
                self.hidden = self._embed()
            self._attention = {} if keep else None
            module = self._load(self.skeleton.get_submodule(f"{self.family.layers}.{layer}"), layer)
        with self.clock("forward"):
            try:
                if decode:
                    self.decoded = self._decode(module, layer, decode)
                return self._run(module, layer)
            finally:
                module.to("meta")

    def _decode(self, module: nn.Module, layer: int, count: int) -> Float[Tensor, "T D"]:
        """The attention's output for the first sequence's last tokens, computed through a cache."""
        assert self.hidden is not None
        hidden = self.hidden[:1].to(self.device)
        prompt = hidden.shape[1] - count
        carried = {cache_argument(module): DynamicCache(config=self.skeleton.config)}
        with self._watched(module) as seen:
            for start, stop in pairwise([0, *range(prompt, prompt + count + 1)]):
                # A cache holds no more than the layer's window: a step may see all of it.
                mask = self._mask(layer, stop) if start == 0 else None
                piece = hidden[:, start:stop]
                module(piece, **self._given(layer, piece, mask, start), **carried)
        return torch.cat([y[0] for _, y in seen[1:]]).cpu()

    @contextmanager
    def _watched(self, module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """A list that gets what the layer's attention reads and gives, at every call."""
        seen: list[tuple[Tensor, Tensor]] = []
        handle = module.get_submodule(self.family.attention).register_forward_hook(
            lambda _, args, kwargs, out: seen.append(
                (args[0] if args else kwargs["hidden_states"], out[0])
            ),
            with_kwargs=True,
        )
        try:
            yield seen
        finally:
            handle.remove()

    def _given(self, layer: int, batch: Tensor, mask: Tensor | None, start: int) -> dict[str, Any]:
        """A layer's arguments beside its input [B, T, D], whose first token stands at `start`."""
        positions = torch.arange(start, start + batch.shape[1], device=self.device)[None]
        given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
        if self.rotary is not None:
            # Where each kind of layer has frequencies of its own, they are asked for by its name.
            kinds = hasattr(self.rotary, "layer_types")
            kind = [layer_kind(self.source.config, layer)] if kinds else []
            given["position_embeddings"] = self.rotary(batch, positions, *kind)
        return given

    def _run(self, module: nn.Module, layer: int) -> Activations:
        assert self.hidden is not None
        x, y = torch.empty_like(self.hidden), torch.empty_like(self.hidden)
        weights = self.hidden.new_empty(self.tokens.shape)
        config = self.source.config
        parallel, post_norm = self.family.parallel(config), self.family.post_norm
        mask = self._mask(layer, self.tokens.shape[1])
        with self._watched(module) as seen:
            for rows in self._rows():
                batch = self.hidden[rows].to(self.device)
                given = self._given(layer, batch, mask, 0)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
                    out = module(batch, **given)
                out = (out[0] if isinstance(out, tuple) else out).cpu()
                x[rows], does = seen.pop()
                y[rows] = does
                added = does if post_norm is None else module.get_submodule(post_norm)(does)
                stream = out if parallel else self.hidden[rows] + added.cpu()
                # A norm in between does to an error what it does to y.
                before, after = (_energy(z).cpu() for z in (does, added))
                weights[rows] = after / before / _energy(stream)
                self.hidden[rows] = out
        if not (self.hidden.isfinite().all() and y.isfinite().all()):
            raise InputError(
                f"{self.source.path}: layer {layer} gives values that are not finite on the "
                "calibration text. The checkpoint is damaged, or is not that of its config.json."
            )
        return Activations(*(part.to(self.device) for part in (x, y, weights)))

    def _mask(self, layer: int, length: int) -> Tensor | None:
        """What the layer's attention is given: None for plainly causal."""
        slides = window(self.source.config, layer)
        eager = self.skeleton.config._attn_implementation == "eager"
        if not eager and (slides is None or slides >= length):
            return None
        mask = visible(slides, 0, length, self.device)[None, None]
        if not eager:
            return mask
        return torch.zeros(mask.shape, device=self.device).masked_fill(~mask, -torch.inf)

    def _rows(self) -> Iterator[slice]:
        count, length = self.tokens.shape
        eager = self.skeleton.config._attn_implementation == "eager"
        step = 1 if eager else max(1, TOKENS_AT_ONCE // length)
        for start in range(0, count, step):
            yield slice(start, start + step)

    def _embed(self) -> Float[Tensor, "N T D"]:
        table = self.source.tensor(self._stored(self._embeddings(), self.source))
        hidden = nn.functional.embedding(self.tokens, table).float()
        hidden *= self.family.embed_scale(self.source.config)
        if self.family.positions is not None:
            first = self.family.first_position
            table = self.source.tensor(f"{self.family.positions}.weight").float()
            hidden += table[first : first + hidden.shape[1]]
        return hidden

    def _embeddings(self) -> str:
        """The name of the table of embeddings."""
        module = self.skeleton.base_model.get_input_embeddings()
        return next(f"{n}.weight" for n, m in self.skeleton.named_modules() if m is module)

    def _stored(self, name: str, source: Source) -> str:
        """A tied pair may be stored under either name."""
        if name in source:
            return name
        return next(
            other
            for pair in self.skeleton.all_tied_weights_keys.items()
            for other in pair
            if name in pair and other in source
        )

    def _load(self, module: nn.Module, layer: int) -> nn.Module:
        prefix = f"{self.family.layers}.{layer}."
        weights = {
            name: self._weight(prefix, name, like.shape).to(self.device, torch.float32)
            for name, like in module.state_dict().items()
        }
        module.load_state_dict(weights, assign=True)
        for parameter in module.parameters():
            # As transformers marks what it has loaded.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        for part in module.modules():
            computed = [n for n, b in part.named_buffers(recurse=False) if b.is_meta]
            for buffer in computed:  # not stored: the model's own class fills them
                setattr(part, buffer, torch.empty_like(getattr(part, buffer), device=self.device))
            if computed:
                self.skeleton._init_weights(part)
        return module

    def _weight(self, prefix: str, name: str, shape: torch.Size) -> Tensor:
        """A tensor of a layer's module; all experts' are put together from each one's."""
        experts = self.family.experts
        if experts is None or prefix + name in self.source:
            return self._read(prefix, name)
        owner, _, last = name.replace("mlp.", f"{experts.block}.", 1).rpartition(".")
        if last not in experts.parts:
            return self._read(prefix, f"{owner}.{last}")
        return torch.stack(
            [
                torch.cat(
                    [
                        self._read(prefix, f"{owner}.{expert}.{part}.weight")
                        for part in experts.parts[last]
                    ]
                )
                for expert in range(shape[0])
            ]
        )

    def _read(self, prefix: str, name: str) -> Tensor:
        """A layer's tensor as it is stored, kept or given to `on_tensor`."""
        tensor = self.source.tensor(prefix + name)
        if not name.startswith(f"{self.family.attention}."):
            self.on_tensor(prefix + name, tensor)
        elif self._attention is not None:
            self._attention[prefix + name] = tensor
        return tensor

    def _of_attention(self, name: str) -> Tensor:
        kept = (self._attention or {}).pop(name, None)
        return self.source.tensor(name) if kept is None else kept


def _energy(x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T"]:
    return x.square().sum(-1).clamp_min(1e-12)
