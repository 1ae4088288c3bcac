"""What keys and values matter, against autograd through the whole model and finite differences."""

import folders
import pytest
import sources
import torch
from layers import error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rehead.converters import InputError, fisher, stream
from rehead.converters.checkpoint import open_source
from rehead.converters.clock import Clock
from rehead.converters.families import family_of, head_dim
from rehead.converters.families.family import _halves
from rehead.converters.fisher import fisher_moments
from rehead.converters.job import Job
from rehead.converters.moments import CodingMoments
from rehead.converters.processes import Processes
from rehead.converters.recipe import Recipe
from rehead.converters.targets import target_of
from rehead.converters.work import OURS, load

SKIP = 4
IDS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
CASES = {
    **sources.CASES,
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "mixtral, routers shown": ("mixtral", dict(output_router_logits=True)),
    "gpt2, head of its own": ("gpt2", dict(tie_word_embeddings=False)),
    "opt, head of its own": ("opt", dict(tie_word_embeddings=False)),
}


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def model_of(case):
    family, fields = CASES[case]
    return sources.model(case if case in sources.CASES else family, **fields)


def streamed(folder, work, ids=IDS, generator=None, skip=SKIP):
    """{layer: moments} of the checkpoint in the folder."""
    source = open_source(folder)
    work.mkdir(exist_ok=True)
    found = fisher_moments(
        *(source, family_of(source.config), ids, work, generator or seeded()),
        device=torch.device("cpu"),
        clock=Clock(),
        progress=lambda *call: None,
        skip=skip,
    )
    return {layer: moments for layer, _, moments, _ in found}


def numbers_of(model, layer, out):
    """Keys before their norm and values, [N, T, M], of what the projections gave."""
    family, config = family_of(model.config), model.config
    left = {f"{name}.bias": rows.movedim(-1, 0) for name, rows in out.items()}
    parts = family._take(left, "bias", config)  # [heads, width, N, T]
    order = _halves(head_dim(config), family.rotary_dim(config))
    k, v = parts["k"][:, order], parts["v"]
    return torch.cat([part.flatten(0, 1).movedim(0, -1) for part in (k, v)], -1)


class Whole:
    """The model in memory, with hooks on what makes keys and values."""

    def __init__(self, model):
        self.model, self.family = model.requires_grad_(False), family_of(model.config)
        self.layers = range(model.config.num_hidden_layers)
        self.made = {layer: {} for layer in self.layers}
        self.read = {}
        fused = self.family.fused
        names = (fused,) if fused else (self.family.q, self.family.k, self.family.v)
        for layer in self.layers:
            attends = model.get_submodule(f"{self.family.layers}.{layer}.{self.family.attention}")
            for name in names:
                getattr(attends, name).register_forward_hook(self.hook(layer, name))

    def hook(self, layer, name):
        def keep(module, args, out):
            self.read[layer] = args[0].detach()
            out = out.detach().requires_grad_() if not out.requires_grad else out
            self.made[layer][name] = out
            return out

        return keep

    def moments(self, labels="drawn", skip=SKIP):
        """{layer: (importance, covariance, mean)}."""
        with torch.enable_grad():
            logits = self.model(IDS, use_cache=False).logits.float().flatten(0, 1)
        drawn = logits.detach().softmax(-1).multinomial(1, replacement=True, generator=seeded())
        drawn = drawn if labels == "drawn" else IDS.roll(-1, 1).view(-1, 1)
        loss = logits.log_softmax(-1).gather(1, drawn).sum()
        outs = [(layer, name) for layer in self.layers for name in self.made[layer]]
        grads = torch.autograd.grad(loss, [self.made[layer][name] for layer, name in outs])
        found = {}
        for layer in self.layers:
            of_layer = {n: g for (at, n), g in zip(outs, grads, strict=True) if at == layer}
            g, x = (
                rows[:, skip:].flatten(0, 1).double()
                for rows in (numbers_of(self.model, layer, of_layer), self.read[layer])
            )
            found[layer] = g.T @ g / len(g), x.T.cov(correction=0), x.mean(0)
        return found


MEANS = "importance", "covariance", "mean"


def distance(found, wanted):
    return max(
        error(getattr(found[layer], name), one)
        for layer in wanted
        for name, one in zip(MEANS, wanted[layer], strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_the_moments_are_those_of_the_whole_model(case, tmp_path):
    model = folders.save(tmp_path / "model", model_of(case))
    found = streamed(tmp_path / "model", tmp_path / "work")
    whole = Whole(model)
    assert [*found] == [*reversed(whole.layers)]
    assert distance(found, whole.moments()) < 1e-4
    assert not [*(tmp_path / "work").iterdir()]
    for layer, moments in found.items():
        assert error(moments.first.inputs, whole.read[layer][:, :SKIP].flatten(0, 1)) < 1e-4
        assert moments.first.positions.tolist() == [*range(SKIP)] * len(IDS)
    # The text's own labels make the empirical Fisher; first tokens matter more.
    for wrong in (dict(labels="text"), dict(skip=0)):
        assert distance(found, whole.moments(**wrong)) > 1e-2


def edited(folder, change):
    """The folder, after `change` was called with its weights by name."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_is_taken_as_transformers_takes_it(tmp_path):
    """Tied and stored under the head's name alone, or said to be tied and stored apart."""
    folder, table, head = tmp_path / "model", "model.embed_tokens.weight", "lm_head.weight"
    folders.save(folder, model_of("llama, tied"))
    tied = streamed(folder, tmp_path / "work")
    edited(folder, lambda weights: weights.update({head: weights.pop(table)}))
    swapped = streamed(folder, tmp_path / "work")
    edited(folder, lambda weights: weights.update({table: weights[head].flip(0)}))
    apart = streamed(folder, tmp_path / "work")
    for layer, moments in tied.items():
        assert torch.equal(moments.importance, swapped[layer].importance)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    wanted = Whole(model).moments()
    assert distance(apart, wanted) < 1e-4
    assert distance(tied, wanted) > 1e-2


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3, sliding"])
def test_batches_and_pieces_change_nothing(case, tmp_path, monkeypatch):
    """The cases in which a batch is one sequence, and in which it is all of them."""
    folders.save(tmp_path / "model", model_of(case))
    whole = streamed(tmp_path / "model", tmp_path / "work")
    monkeypatch.setattr(stream, "TOKENS_AT_ONCE", 2 * IDS.shape[1])  # 2 sequences, then 1
    monkeypatch.setattr(fisher, "HEAD_TOKENS", 17)
    pieces = streamed(tmp_path / "model", tmp_path / "work")
    wanted = {layer: [getattr(m, name) for name in MEANS] for layer, m in whole.items()}
    assert distance(pieces, wanted) < 1e-5
    for layer, moments in whole.items():
        for name, part in vars(moments.first).items():
            assert error(getattr(pieces[layer].first, name), part) < 1e-5
    other = streamed(tmp_path / "model", tmp_path / "work", generator=seeded(6))
    assert error(other[0].importance, whole[0].importance) > 1e-2


@pytest.mark.parametrize("case", ["starcoder2", "opt"])  # in float64 throughout
@torch.no_grad()
def test_gradients_are_finite_differences_of_the_log_likelihood(case, tmp_path):
    """Two tokens count, and every number of theirs is moved by itself, in the whole model."""
    ids, counted, step = IDS[:1, :12], 2, 1e-5
    model = folders.save(tmp_path / "model", model_of(case))
    skip = ids.shape[1] - counted
    found = streamed(tmp_path / "model", tmp_path / "work", ids=ids, skip=skip)[0].importance
    predicted = model(ids).logits.float().softmax(-1)[0]
    labels = predicted.multinomial(1, replacement=True, generator=seeded())[:, 0]
    width = len(found)
    moves = torch.zeros(counted, width, ids.shape[1], width, dtype=torch.float64)
    for token in range(counted):
        moves[token, :, skip + token] = step * torch.eye(width)
    moves = moves.flatten(0, 1)
    model.double()
    attends = model.get_submodule(family_of(model.config).prefix(0)[:-1])

    def after(sign):
        handles = [
            getattr(attends, name).register_forward_hook(
                lambda module, args, out, move=move: out + sign * move
            )
            for name, move in zip(("k_proj", "v_proj"), moves.chunk(2, -1), strict=True)
        ]
        logits = model(ids.expand(len(moves), -1)).logits
        for handle in handles:
            handle.remove()
        return logits.log_softmax(-1)[:, range(ids.shape[1]), labels].sum(1)

    gradients = ((after(1) - after(-1)) / (2 * step)).view(counted, width)
    assert error(found, gradients.T @ gradients / counted) < 1e-4
    assert error(found, gradients[:1].T @ gradients[:1]) > 1e-2


def job(folder, progress):
    source = open_source(folder)
    recipe = Recipe(
        *(str(folder), "mla", "decoupled", 0.5, "text"), samples=3, heal=0, seed=0, kv_bits="auto"
    )
    given = family_of(source.config), recipe, target_of(source.config, recipe)
    return Job(source, *given, torch.device("cpu"), progress, Processes())


def test_an_interrupted_pass_is_made_up_for_and_a_finished_one_is_not_run(tmp_path):
    folders.save(tmp_path / "model", model_of("llama"))
    calls = []

    def run(work, progress):
        (tmp_path / work).mkdir(exist_ok=True)
        job(tmp_path / "model", progress).survey(IDS, tmp_path / work)

    def kept(work):
        files = sorted((tmp_path / work).iterdir())
        assert all(OURS.fullmatch(file.name) for file in files)
        return {file.name: load(file, torch.device("cpu")) for file in files}

    def stop(stage, done, total, info):
        if done == 4:  # the last of two layers is kept
            raise KeyboardInterrupt

    run("whole", lambda *call: calls.append(call))
    assert calls == [("importance", done, 5, {}) for done in range(1, 6)]
    with pytest.raises(KeyboardInterrupt):
        run("resumed", stop)
    assert [*kept("resumed")] == ["input-0000.pt", "moments-0001.pt"]
    run("resumed", lambda *call: None)
    wanted, found = kept("whole"), kept("resumed")
    assert [*wanted] == [*found] == ["moments-0000.pt", "moments-0001.pt"]
    for name in wanted:
        one, other = (kept[name]["moments"] for kept in (wanted, found))
        assert isinstance(other, CodingMoments)
        assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in MEANS)
        for part, numbers in vars(one.first).items():
            assert torch.equal(numbers, getattr(other.first, part))
    run("whole", lambda *call: calls.append(call))
    assert len(calls) == 5


def test_what_cannot_be_computed_is_refused(tmp_path):
    folders.save(tmp_path / "model", model_of("llama"))
    with pytest.raises(ValueError, match="skip=40 leaves none of 40 tokens"):
        streamed(tmp_path / "model", tmp_path / "work", skip=40)
    edited(tmp_path / "model", lambda weights: weights["lm_head.weight"].fill_(3e38))
    with pytest.raises(InputError, match="predictions are not finite"):
        streamed(tmp_path / "model", tmp_path / "work")
