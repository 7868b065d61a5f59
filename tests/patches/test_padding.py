"""Padding-free passes: the numbers of stock on what is no padding, and stock wherever padding might count."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_turbo.patches import attention_seams, micro_batches, padding, varlen
from torch import nn

import hf_turbo
from tests.models import (
    ATTENTION,
    FAMILIES,
    VOCABULARY,
    loss_and_gradients,
    reference64,
    switch_on,
    switched_off,
    tiny_model,
)

OTHERS = switched_off("padding")
LENGTHS = (17, 30, 30, 4)


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    hf_turbo.disable()


def patch(model: nn.Module, **options: Any) -> Any:
    report = hf_turbo.patch_model(model, **{**OTHERS, "padding": True, **options})
    return next(row for row in report.rows if row.role == "padding")


def padded(lengths: tuple[int, ...] = LENGTHS, left: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of these lengths, labels on all tokens but the first third of each."""
    columns = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), columns), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        start = columns - length if left else 0
        mask[row, start : start + length] = 1
        labels[row, start + 1 + length // 3 : start + length] = ids[row, start + 1 + length // 3 : start + length]
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def state_of(model: nn.Module) -> Any:
    return next(padding._STATES[module] for module in model.modules() if module in padding._STATES)


def results(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    loss, gradients = loss_and_gradients(model, inputs)
    return {"loss": loss, **{name: gradient.clone() for name, gradient in gradients.items()}}


def check(model: Any, inputs: dict[str, Any], exact_model: Any = None, **options: Any) -> None:
    """The rule of the house, against stock and float64, for all tensors of four batches together: one is luck."""
    batches = [{**inputs, "labels": relabelled(inputs["labels"], seed)} for seed in range(4)]
    exact = []
    for each in batches:
        loss, gradients = reference64(exact_model or model, each)
        exact.append({"loss": loss, **gradients})
    stock = [results(model, each) for each in batches]
    patch(model, **options)
    ours = [results(model, each) for each in batches]
    state = state_of(model)
    assert state.reason == ""
    real = int(inputs["attention_mask"].sum())
    assert (state.tokens, state.stock_tokens) == (4 * real, 4 * inputs["attention_mask"].numel())
    ours_error, stock_error = error_of(ours, exact), error_of(stock, exact)
    assert ours_error <= 1.1 * stock_error + torch.finfo(torch.float32).eps, (
        f"{ours_error:.3e}, stock {stock_error:.3e}"
    )


def relabelled(labels: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(labels == -100, labels, torch.randint(3, VOCABULARY, labels.shape, generator=generator))


def error_of(some: list[dict[str, torch.Tensor]], exact: list[dict[str, torch.Tensor]]) -> float:
    """Root mean square of the relative errors of all tensors; a tensor's errors and norms are summed over batches."""
    squares = []
    for name in exact[0]:
        errors = sum(float((a[name].double() - b[name]).square().sum()) for a, b in zip(some, exact, strict=True))
        norms = sum(float(b[name].square().sum()) for b in exact)
        if norms > 1e-20:
            squares.append(errors / norms)
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize("family", [*FAMILIES, *ATTENTION])
@pytest.mark.parametrize("left", [False, True])
def test_as_exact_as_stock(family, left):
    check(tiny_model(family), padded(left=left))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_16_bits(family, dtype):
    check(tiny_model(family, dtype), padded())


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointing(reentrant):
    model = tiny_model("llama", num_hidden_layers=3)
    switch_on(model, reentrant)
    check(model, padded(), tiny_model("llama", num_hidden_layers=3), checkpointing="auto")


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3-moe"])
def test_eager_attention(family, left):
    check(tiny_model(family, attn_implementation="eager"), padded((30, 25, 9), left=left))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_eager_attention_without_padding(family, monkeypatch):
    """On a GPU by documents as well, which saves its scores; on a CPU it is stock's."""
    inputs = padded((30, 30))
    model = tiny_model(family, attn_implementation="eager")
    results(model, inputs)
    patch(model)
    results(model, inputs)
    assert state_of(model).passes == 0
    hf_turbo.disable()
    monkeypatch.setattr(padding, "_EAGER_IS_SLOW", {"cpu"})
    check(tiny_model(family, attn_implementation="eager"), inputs)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_eager_attention_in_16_bits(family):
    check(tiny_model(family, torch.bfloat16, attn_implementation="eager"), padded())


def test_capped_scores():
    """So low a cap that nearly all scores come near it, and rows three times as long as the window."""
    check(tiny_model("gemma2", attn_logit_softcapping=0.2, sliding_window=8), padded((30, 25, 9)))


def test_sinks_that_take_most_of_the_weight():
    model = tiny_model("gpt-oss")
    for layer in model.model.layers:
        layer.self_attn.sinks.data += 3
    check(model, padded((30, 25, 9)))
    assert "model.layers.0.self_attn.sinks" in results(model, padded())


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_capped_scores_and_sinks_under_autocast(family):
    model, inputs = tiny_model(family), padded()
    loss, gradients = reference64(model, inputs)
    exact = [{"loss": loss, **gradients}]
    with torch.autocast("cpu", torch.bfloat16):
        stock = [results(model, inputs)]
        patch(model)
        ours = [results(model, inputs)]
    assert state_of(model).tried
    assert error_of(ours, exact) <= 1.1 * error_of(stock, exact)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_capped_scores_and_sinks_with_dropout(family):
    model, inputs = tiny_model(family, attention_dropout=0.3), padded()
    torch.manual_seed(3)
    stock = results(model, inputs)
    patch(model)
    torch.manual_seed(3)
    ours = results(model, inputs)
    assert state_of(model).reason == "attention drops weights, and caps its scores or has sinks"
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_with_all_other_patches():
    check(tiny_model("llama"), padded(), **dict.fromkeys(("norms", "mlp", "rope", "loss", "host"), "auto"))


def test_by_embeddings_and_positions():
    model, inputs = tiny_model("qwen3"), padded()
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    positions = torch.arange(30)[None].expand(4, 30) + 3
    check(model, {**inputs, "inputs_embeds": embeddings, "position_ids": positions})


def test_masks_with_holes_and_rows_of_padding():
    inputs = padded((17, 30, 1, 30))
    inputs["attention_mask"][1, 5:9] = 0
    inputs["labels"][1, 5:10] = -100
    inputs["attention_mask"][2] = 0
    check(tiny_model("llama"), inputs)


def test_booleans_as_masks():
    inputs = padded()
    check(tiny_model("llama"), {**inputs, "attention_mask": inputs["attention_mask"].bool()})


def test_windows_reach_no_farther_than_in_stock():
    """Rows three times as long as the window."""
    for family in ("mistral", "gemma3"):
        check(tiny_model(family), padded((30, 25, 9)))
        hf_turbo.disable()


def test_hidden_states_are_where_they_were():
    model, inputs = tiny_model("llama").model, padded(left=True)
    inputs.pop("labels")
    stock = model(**inputs).last_hidden_state
    patch(model)
    ours = model(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], stock[real], rtol=1e-5, atol=1e-5)
    assert not ours[~real].any()


def test_no_bit_of_a_row_depends_on_another():
    model, inputs = tiny_model("llama").model, padded()
    inputs.pop("labels")
    patch(model)
    before = model(**inputs).last_hidden_state
    inputs["input_ids"][0] = 5
    after = model(**inputs).last_hidden_state
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


# ------------------------------------------------------------------------------------------------ FlashAttention


def attended(query: Any, key: Any, value: Any, scale: float, window: int | None, softcap: float | None) -> Any:
    """Causal attention to one document, [T, H, D]."""
    query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    key, value = (each.repeat_interleave(len(query) // len(each), 0) for each in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    position = torch.arange(query.shape[1])
    distance = position[:, None] - position
    scores = scores.masked_fill((distance < 0) | (distance >= (window or len(position))), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


@pytest.fixture
def flash(monkeypatch) -> Iterator[list[list[int]]]:
    """What transformers calls for FlashAttention, which is not installed; lengths of documents of each call."""
    from transformers.integrations import flash_attention
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    calls = []

    def forward(query: Any, key: Any, value: Any, attention_mask: Any, query_length: int, **kwargs: Any) -> Any:
        options = [kwargs[name] for name in ("softmax_scale", "sliding_window", "softcap")]
        starts = kwargs.get("cu_seq_lens_q")
        if attention_mask is not None:
            output = torch.zeros_like(query)
            for row, mask in enumerate(attention_mask.bool()):
                output[row, mask] = attended(*(each[row, mask] for each in (query, key, value)), *options)
            return output
        if starts is None:
            return torch.stack([attended(*row, *options) for row in zip(query, key, value, strict=True)])
        lengths = starts.diff().tolist()
        assert starts.dtype is torch.int32
        assert torch.equal(starts, kwargs["cu_seq_lens_k"])
        assert type(kwargs["max_length_q"]) is int
        assert (kwargs["max_length_q"], kwargs["max_length_k"]) == (max(lengths),) * 2
        assert kwargs.get("position_ids") is None
        assert "documents" not in kwargs
        assert query.shape[:2] == (1, starts[-1])
        calls.append(lengths)
        parts = [each[0].split(lengths) for each in (query, key, value)]
        return torch.cat([attended(*document, *options) for document in zip(*parts, strict=True)])[None]

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", forward)
    monkeypatch.setitem(AttentionInterface._global_mapping, "us/flash-kernel", flash_attention.flash_attention_forward)
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, "us/flash-kernel", masks["flash_attention_2"])
    yield calls
    hf_turbo.disable()  # before the registry loses the name


def with_flash(family: str, name: str = "flash_attention_2", **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    model.config._attn_implementation = name
    return model


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "flash_attention_3"), ("mistral", "flash_attention_2"), ("gemma2", "us/flash-kernel")],
)
def test_flash_attention(flash, family, name):
    check(with_flash(family, name), padded((30, 25, 9)))
    assert flash == [[30, 25, 9]] * 2 * 4


def test_flash_attention_with_left_padding_and_checkpointing(flash):
    model = with_flash("llama")
    switch_on(model)
    check(model, padded(left=True), with_flash("llama"))
    assert flash == [list(LENGTHS)] * 4 * 4


def test_packed_rows_are_left_to_flash_attention(flash):
    """Positions and all: there is nothing to leave out."""
    inputs, starts = packed(), torch.tensor([0, 17, 47, 77, 81], dtype=torch.int32)
    more = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 30, "max_length_k": 30}
    model = with_flash("llama")
    patch(model)
    with pytest.raises(AssertionError, match="position_ids"):  # which transformers passes on, and hf_turbo does not
        model(**inputs, **more)
    assert state_of(model).tokens == 0


def test_an_entry_that_is_not_flash_attention(monkeypatch):
    from transformers.modeling_utils import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "us/other-kernel", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="attn_implementation is 'us/other-kernel'"):
        patch(with_flash("llama", "us/other-kernel"))


def test_flash_attention_switched_off_between_forward_and_recomputation(flash, monkeypatch):
    """transformers' own code for masks, which FlashAttention gets behind."""
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations import flash_attention

    model = with_flash("llama")
    switch_on(model)
    patch(model)
    loss = model(**padded()).loss
    hf_turbo.disable()

    def forward(query: Any, key: Any, value: Any, attention_mask: Any, query_length: int, **kwargs: Any) -> Any:
        return utils._upad_input(query, key, value, attention_mask, query_length, utils._unpad_input)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", forward)
    with pytest.raises((RuntimeError, IndexError), match=r"max\(\)"):
        loss.backward()


# ------------------------------------------------------------------------------------------------ packed by the script


def packed(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of documents, as TRL packs: positions start anew, no mask, no label for a first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "sdpa") for family in ("llama", "mistral", "gemma3", "qwen2", "phi3")]
    + [(family, "eager") for family in ("mistral", "gemma2")],
)
def test_packed_rows(family, attention, monkeypatch):
    model, inputs = tiny_model(family, attn_implementation=attention), packed()
    loss, gradients = reference64(model, inputs)
    exact, stock = [{"loss": loss, **gradients}], [results(model, inputs)]
    patch(model)
    seen = []
    attend = varlen.varlen_attention
    monkeypatch.setattr(varlen, "varlen_attention", lambda *a, **k: seen.append(a[3]) or attend(*a, **k))
    ours = [results(model, inputs)]
    assert seen == [list(LENGTHS)] * 2
    assert error_of(ours, exact) <= 1.2 * error_of(stock, exact)


def test_no_bit_of_a_packed_document_depends_on_another():
    model, inputs = tiny_model("llama").model, packed()
    inputs.pop("labels")
    patch(model)
    before = model(**inputs).last_hidden_state
    inputs["input_ids"][0, 17:47] = 5
    after = model(**inputs).last_hidden_state
    others = torch.tensor([i for i in range(sum(LENGTHS)) if not 17 <= i < 47])
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before, after)


def test_one_document_is_no_packed_row():
    stays_stock(tiny_model("llama"), packed((30,)))


def test_packed_rows_of_which_stock_makes_one_document():
    """gpt-oss makes its masks without looking at positions."""
    stays_stock(tiny_model("gpt-oss"), packed())


def test_where_stock_does_not_keep_documents_apart():
    """It looks for them only where it makes no cache."""
    model, inputs = tiny_model("llama", use_cache=True), packed()
    del inputs["use_cache"]
    stock = results(model, inputs)
    patch(model)
    for name, value in results(model, inputs).items():
        assert torch.equal(value, stock[name])


def test_what_trl_adds_to_a_packed_row():
    model, inputs = tiny_model("llama"), packed()
    stock = results(model, inputs)
    bounds = torch.tensor([0, 17, 47, 77, 81], dtype=torch.int32)
    patch(model)
    more = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 30, "max_length_k": 30}
    ours = results(model, {**inputs, **more})
    assert state_of(model).tried
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ what stays stock


def stays_stock(model: Any, inputs: dict[str, Any], **kwargs: Any) -> None:
    stock = model(**inputs, **kwargs)
    patch(model)
    ours = model(**inputs, **kwargs)
    assert torch.equal(ours.logits, stock.logits)
    assert state_of(model).tokens == 0


def test_nothing_to_leave_out():
    stays_stock(tiny_model("llama"), padded((30, 30)))


@pytest.mark.parametrize("asked", ["output_hidden_states", "use_cache"])
def test_what_is_asked_for_by_token(asked):
    stays_stock(tiny_model("llama"), padded(), **{asked: True})


def test_router_logits():
    stays_stock(tiny_model("mixtral"), padded(), output_router_logits=True)


def test_evaluation():
    stays_stock(tiny_model("llama").eval(), padded())
    with torch.no_grad():
        hf_turbo.disable()
        stays_stock(tiny_model("llama"), padded())


def test_masks_of_four_dimensions():
    inputs = padded()
    real = inputs["attention_mask"].bool()
    inputs["attention_mask"] = real[:, None, None, :] & torch.ones(30, 30, dtype=torch.bool).tril()
    stays_stock(tiny_model("llama"), inputs)


def test_a_config_that_caches_makes_none_in_training():
    model = tiny_model("llama", use_cache=True)
    inputs = padded()
    stock = model(**inputs).loss
    patch(model)
    output = model(**inputs)
    assert output.past_key_values is None
    assert state_of(model).tokens > 0
    torch.testing.assert_close(output.loss, stock)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"attn_implementation": "flex_attention"}, "attn_implementation is 'flex_attention'"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_refused_with_a_reason(family, changes, reason):
    model = tiny_model(family, **changes)
    with pytest.raises(RuntimeError, match=reason):
        patch(model)


def test_sinks_that_sdpa_leaves_out():
    """transformers' sdpa ignores them: whatever it computes, it goes on."""
    model = tiny_model("gpt-oss")
    model.config._attn_implementation = "sdpa"
    inputs = padded()
    stock = results(model, inputs)
    patch(model)
    ours = results(model, inputs)
    assert state_of(model).reason == "attention takes s_aux"
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row(kind):
    model = tiny_model("llama")
    model.config.rope_parameters = {
        "full_attention": {"rope_type": kind},
        "sliding_attention": {"rope_type": "default"},
    }
    with pytest.raises(RuntimeError, match="its rotary embedding depends on the longest row"):
        patch(model)


def test_a_backbone_that_reads_the_mask_itself():
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(vocab_size=97, hidden_size=24, ffn_dim=16, num_hidden_layers=1))
    assert padding.find(model, device_type="cpu").patched == 0


def test_layers_that_remember_in_other_ways():
    """Convolutions of LFM2 run over the tokens of all rows: found in the first pass, which stock does again."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        attn_implementation="sdpa",
    )
    model, inputs = Lfm2ForCausalLM(config).train(), padded()
    stock = results(model, inputs)
    finding = padding.find(model, device_type="cpu")
    if finding.patched:
        patch(model)
        for name, value in results(model, inputs).items():
            assert torch.equal(value, stock[name])
        assert "layers attend through the registry" in state_of(model).reason
    else:
        assert finding.reasons


def test_dropout_is_restored_for_the_pass_that_stock_does_again():
    model, inputs = tiny_model("llama", attention_dropout=0.3), padded()
    torch.manual_seed(3)
    stock = results(model, inputs)
    row = patch(model)
    assert row.exactness == "re-drawn"
    model.model.layers[1].self_attn.is_causal = False
    torch.manual_seed(3)
    ours = results(model, inputs)
    assert state_of(model).reason == "attention is not causal"
    for name, value in ours.items():
        assert torch.equal(value, stock[name])


def test_a_loss_on_padding_is_noticed():
    model, inputs = tiny_model("llama"), padded()
    inputs["labels"] = torch.where(inputs["labels"] == -100, 7, inputs["labels"])
    stock = results(model, inputs)
    patch(model)
    with pytest.warns(RuntimeWarning, match="depends on the hidden states of padding"):
        results(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in results(model, inputs).items():
            assert torch.equal(value, stock[name])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda b: None, False),
        (lambda b: b.pop("labels"), False),
        (lambda b: b.pop("attention_mask"), False),
        (lambda b: b["labels"].__setitem__((0, 17), 5), False),  # predicted by the last token
        (lambda b: b["labels"].__setitem__((0, 18), 5), True),
        (lambda b: b["labels"].__setitem__((0, 0), 5), False),  # predicted by nothing
    ],
)
def test_labels_on_padding(change, expected):
    inputs = padded()
    change(inputs)
    assert micro_batches.labels_on_padding(inputs) is expected


def test_the_first_token_behind_left_padding():
    inputs = padded(left=True)
    assert not micro_batches.labels_on_padding(inputs)
    inputs["labels"][0, 13] = 5
    assert micro_batches.labels_on_padding(inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_switched_off_between_forward_and_recomputation(attention):
    """An error, and not attention of all tokens to all: the layers hold on to a mask that stock cannot use."""
    model = tiny_model("llama", attn_implementation=attention)
    switch_on(model)
    patch(model)
    loss = model(**padded()).loss
    hf_turbo.disable()
    with pytest.raises(RuntimeError, match=r"size of tensor|expanded size|must match"):
        loss.backward()


def test_switched_off_between_forward_and_backward():
    model, inputs = tiny_model("llama"), padded()
    stock = results(model, inputs)
    patch(model)
    model.zero_grad()
    loss = model(**inputs).loss
    hf_turbo.disable()
    loss.backward()
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight.grad, stock["model.layers.0.mlp.up_proj.weight"]
    )


def test_hooks_that_go_by_shape():
    model, inputs = tiny_model("llama"), padded()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks on its layers"):
        patch(model)
    handle.remove()
    hf_turbo.disable()
    patch(model)
    model.enable_input_require_grads()
    model(**inputs)
    tokens = state_of(model).tokens
    assert tokens > 0
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 1.5)  # as NEFTune's
    model(**inputs)
    assert state_of(model).tokens == tokens


def weighted(weights: Any) -> Any:
    """An eager function that does to its scores what no other does."""

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        scores = torch.einsum("bhsd,bgtd->bhst", query, key[:, :1]) * scaling + attention_mask
        return (scores.softmax(-1) * weights @ value[:, :1]).transpose(1, 2), None

    return eager_attention_forward


def test_an_unknown_eager_function(monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", weighted(0.5))
    with pytest.raises(RuntimeError, match=r"is not known|was replaced"):
        patch(tiny_model("llama", attn_implementation="eager"))


def test_eager_functions_read_for_the_first_time(monkeypatch):
    from transformers.models.cwm import modeling_cwm

    monkeypatch.setattr(modeling_cwm, "eager_attention_forward", weighted(0.5))
    attention = vars(modeling_cwm)["CwmAttention"]
    with pytest.raises(varlen.NotUnderstood, match="is not known"):
        attention_seams._eager(*attention_seams._eager_global(attention))


def test_attention_weights_of_eager_attention():
    model, inputs = tiny_model("llama", attn_implementation="eager"), padded()
    stock = model(**inputs, output_attentions=True)
    patch(model)
    model(**inputs)
    tokens = state_of(model).tokens
    assert tokens > 0
    ours = model(**inputs, output_attentions=True)
    assert state_of(model).tokens == tokens
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, stock.attentions, strict=True))


def test_eager_attention_is_reverted():
    """And the registry has no entry "eager" at any time."""
    from transformers.modeling_utils import AttentionInterface
    from transformers.models.llama import modeling_llama

    model, stock = tiny_model("llama", attn_implementation="eager"), modeling_llama.eager_attention_forward
    keys = list(AttentionInterface._global_mapping)
    patch(model)
    assert modeling_llama.eager_attention_forward is not stock
    assert list(AttentionInterface._global_mapping) == keys
    hf_turbo.disable()
    assert modeling_llama.eager_attention_forward is stock


def test_reverted():
    from transformers.modeling_utils import AttentionInterface

    model = tiny_model("llama")
    cls, entry = type(model.model), AttentionInterface._global_mapping["sdpa"]
    patch(model)
    assert type(model.model) is not cls
    assert (type(model.model).__name__, str(type(model.model))) == (cls.__name__, str(cls))
    assert AttentionInterface._global_mapping["sdpa"] is not entry
    hf_turbo.disable()
    assert type(model.model) is cls
    assert AttentionInterface._global_mapping["sdpa"] is entry
