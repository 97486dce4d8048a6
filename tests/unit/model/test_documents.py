"""Documents of a sample that are kept apart are computed as if each were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retro_mcore.errors import ConfigurationError, ShapeError
from retro_mcore.samples.batch import RetroBatch, collate
from retro_mcore.samples.separation import Separation
from tests.unit.model.builders import SMALL, build_model

M, K, EOD = SMALL["retro_chunk_length"], SMALL["retro_num_neighbors"], 0
R = M * SMALL["retro_num_retrieved_chunks"]
APART = {"reset_position_ids": True, "reset_attention_mask": True}
#: Lengths of documents, their ends included: less than a chunk, one chunk, more.
LENGTHS = (M + 3, M, 5, 2 * M + 1)
#: The models are in float64, but rotary angles, of positions counted from the sample's first token,
#: and the loss are computed in float32.
ROUNDING = {"atol": 2e-5, "rtol": 1e-6}


def document(length, generator):
    """A document padded to whole chunks, and the neighbors of its chunks."""
    chunks = -(-length // M)
    tokens = np.full(chunks * M, EOD)
    tokens[: length - 1] = generator.integers(1, 90, length - 1)
    neighbors = generator.integers(1, 90, (chunks, K, R))
    mask = generator.random((chunks, K, R)) < 0.1
    return {"tokens": tokens, "neighbor_tokens": neighbors, "neighbor_mask": mask}


def batch_of(documents, **separation):
    """One sample of these documents."""
    joined = {key: np.concatenate([each[key] for each in documents]) for key in documents[0]}
    tokens = joined.pop("tokens")
    text = np.append(tokens, EOD)
    ends = Separation(EOD, M, **separation)
    past_end = np.concatenate([np.cumsum(each["tokens"] == EOD) > 0 for each in documents])
    loss_mask = (~past_end).astype(np.float32)
    return collate([{"text": text, "loss_mask": loss_mask, "sample_id": 0, **joined,
                     **ends.items(text)}])  # fmt: skip


def without_neighbors(batch):
    return RetroBatch(**{**vars(batch), "retrieved_tokens": None, "retrieved_mask": None})


VARIANTS = {
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "rotary": {"position_embedding_type": "rope", "retro_cross_attention_positions": "rotary"},
    "no positions": {"position_embedding_type": "rope", "no_rope_layers": [1, 2, 3, 4]},
    "a window, DeepNorm": {"position_embedding_type": "rope", "window_size": (M, 0),
                           "window_attn_skip_freq": 2, "retro_deepnorm": True},
}  # fmt: skip


@pytest.mark.parametrize("retrieval", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_documents_alone(megatron, variant, retrieval):
    model = build_model(**VARIANTS[variant]).double()
    generator = np.random.default_rng(3)
    documents = [document(length, generator) for length in LENGTHS]

    def logits(*chosen, **separation):
        batch = batch_of(chosen, **separation)
        with torch.no_grad():
            return model(**(batch if retrieval else without_neighbors(batch)).model_inputs())[0]

    together = logits(*documents, **APART)
    start = 0
    for each in documents:
        end = start + len(each["tokens"])
        torch.testing.assert_close(together[start:end], logits(each), **ROUNDING)
        start = end
    assert not torch.allclose(together[-1], logits(*documents)[-1], atol=1e-3)


def gradients(model, batch):
    """The sum of the losses that count, and its gradients."""
    model.zero_grad()
    losses = model(**batch.model_inputs(), labels=batch.labels)
    loss = (losses * batch.loss_mask).sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def test_gradients_under_recomputation_are_those_of_the_documents_alone(megatron):
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform",
                 "recompute_num_layers": 1}  # fmt: skip
    model = build_model(**recompute).double().train()
    generator = np.random.default_rng(4)
    documents = [document(length, generator) for length in LENGTHS]
    loss, found = gradients(model, batch_of(documents, **APART))
    alone = [gradients(model, batch_of([each])) for each in documents]
    torch.testing.assert_close(loss, sum(each for each, _ in alone), **ROUNDING)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(each[name] for _, each in alone), **ROUNDING)


@pytest.mark.parametrize("passages", [True, False])
def test_packed_instructions_learn_what_they_learn_alone(megatron, passages):
    """Losses and gradients of a packed row, with passages for the encoder and without.

    Without them, examples need not begin on chunk boundaries.
    """
    from retro_mcore.data.instruction.dataset import _lay_out
    from retro_mcore.data.instruction.samples import EncodedExample, InstructionFormat

    generator = np.random.default_rng(5)
    encoder = {"num_encoder_passages": K, "chunk_length": M, "retrieved_length": R}
    format = InstructionFormat(6 * M, **(encoder if passages else {}))
    examples = []
    for length in (M + 5, M, 2 * M + 2):
        tokens = np.append(generator.integers(1, 90, length - 1), EOD)
        given = [generator.integers(1, 90, (K, R)), generator.random((K, R)) < 0.1]
        trained = np.arange(length) > 3
        examples.append(EncodedExample(tokens, trained, *(given if passages else [])))
    model = build_model().double().train()

    def learn(*chosen, packed):
        row = _lay_out(chosen, format, EOD, M if passages else 1, packed)
        batch = collate([{**row, "sample_id": 0}])
        losses = model(**batch.model_inputs(), labels=batch.labels)
        return losses.detach()[batch.loss_mask == 1], *gradients(model, batch)

    losses, loss, found = learn(*examples, packed=True)
    alone = [learn(each, packed=False) for each in examples]
    torch.testing.assert_close(losses, torch.cat([each for each, _, _ in alone]), **ROUNDING)
    torch.testing.assert_close(loss, sum(each for _, each, _ in alone), **ROUNDING)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(each[name] for *_, each in alone), **ROUNDING)


@pytest.mark.parametrize("changed", ["a token", "neighbors of its chunk", "of the mixed chunk"])
def test_nothing_crosses_documents_that_begin_within_chunks(megatron, changed):
    """A packed sample: the second document begins in the middle of chunk 1."""
    model = build_model().double()
    generator = np.random.default_rng(6)
    made = document(4 * M, generator)
    tokens, begin = made["tokens"], M + M // 2
    tokens[tokens == EOD] = 1
    tokens[begin - 1] = EOD

    def logits():
        text = np.append(tokens, 1)
        items = Separation(EOD, None, **APART).items(text)
        neighbors = {key: made[key].copy() for key in ("neighbor_tokens", "neighbor_mask")}
        batch = collate([{"text": text, "sample_id": 0, **neighbors, **items}])
        with torch.no_grad():
            return model(**batch.model_inputs())[0]

    before = logits()
    if changed == "a token":
        tokens[2] = (tokens[2] + 1) % 90 + 1
    else:
        made["neighbor_tokens"][int(changed != "neighbors of its chunk")] += 1
    moved = (logits() - before).abs().amax(dim=-1).gt(0).nonzero().flatten().tolist()
    expected = {"a token": range(2, begin), "neighbors of its chunk": range(M - 1, begin),
                "of the mixed chunk": ()}  # fmt: skip
    assert moved == list(expected[changed])


def test_documents_of_packed_sequences_are_computed_as_those_of_samples(megatron):
    """The way of docs/training.md for a caller's own batch, in parts too."""
    from retro_mcore.model.documents import packed_segments

    model = build_model().double()
    generator = np.random.default_rng(7)
    documents = [document(length, generator) for length in LENGTHS]
    expected = batch_of(documents, **APART)
    neighbors = (expected.retrieved_tokens[None], expected.retrieved_mask[None])
    text = torch.cat((expected.tokens, torch.tensor([[EOD]])), dim=1)

    segments = packed_segments(packed(LENGTHS, whole_chunks(LENGTHS)), text.size(1) - 1)
    batch = RetroBatch.from_text(text, neighbors, segments=segments)
    with torch.no_grad():
        found, wanted = (model(**each.model_inputs()) for each in (batch, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def packed(real, places=None, **changes):
    """Megatron's description of documents with so many tokens, and with their padding."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *real]).cumsum(0).int()
    padded = None if places is None else torch.tensor([0, *places]).cumsum(0).int()
    fields = {"qkv_format": "thd", "cu_seqlens_q": ends, "cu_seqlens_kv": ends,
              "cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded,
              "max_seqlen_q": max(real), "max_seqlen_kv": max(real)}  # fmt: skip
    return PackedSeqParams(**{**fields, **changes})


def whole_chunks(lengths):
    return [-(-length // M) * M for length in lengths]


#: Lengths of documents, as given to Megatron with the padding or beside it.
PACKINGS = {
    "padding as tokens": lambda lengths: packed(whole_chunks(lengths)),
    "padding apart": lambda lengths: packed(lengths, whole_chunks(lengths)),
    "empty documents": lambda lengths: packed([*whole_chunks(lengths), 0, 0]),
    "no other fields": lambda lengths: packed(whole_chunks(lengths), cu_seqlens_kv=None,
                                              max_seqlen_q=None, max_seqlen_kv=None),
}  # fmt: skip


def losses_and_gradients(model, batch, **inputs):
    """The losses that count, and the gradients of their sum."""
    model.zero_grad()
    losses = model(**{**batch.model_inputs(), **inputs}, labels=batch.labels)
    losses = losses[batch.loss_mask == 1]
    losses.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), found


def check_alone(together, alone):
    """The losses and gradients of a row are those of its documents run one by one."""
    losses, found = together
    torch.testing.assert_close(losses, torch.cat([each for each, _ in alone]), **ROUNDING)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(each[name] for _, each in alone), **ROUNDING)


@pytest.mark.parametrize("lengths", [LENGTHS, (4 * M,), (1, 2, M + 1)], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_sequences_learn_what_their_documents_learn_alone(megatron, packing, lengths):
    variants = list(VARIANTS.values())
    model = build_model(**variants[list(PACKINGS).index(packing)]).double().train()
    generator = np.random.default_rng(8)
    documents = [document(length, generator) for length in lengths]
    batch = batch_of(documents, reset_position_ids=True)  # nothing but positions says documents
    together = losses_and_gradients(model, batch, packed_seq_params=PACKINGS[packing](lengths))
    check_alone(together, [losses_and_gradients(model, batch_of([each])) for each in documents])


def test_packed_sequences_need_no_chunks_without_retrieval(megatron):
    """Documents begin anywhere, in the model with retrieval and in the GPT."""
    retro = build_model(position_embedding_type="rope")
    gpt = gpt_of(retro)
    generator = np.random.default_rng(9)
    texts = [torch.from_numpy(generator.integers(1, 90, n + 1))[None] for n in (5, 1, M + 2, 12)]
    row = torch.cat([text[:, :-1] for text in texts] + [torch.tensor([[EOD]])], dim=1)
    together = RetroBatch.from_text(row)
    together.labels = torch.cat([text[:, 1:] for text in texts], dim=1)
    documents = packed([text.size(1) - 1 for text in texts])
    for model in (retro.double().train(), gpt.double().train()):
        found = losses_and_gradients(model, together, packed_seq_params=documents)
        alone = [losses_and_gradients(model, RetroBatch.from_text(text)) for text in texts]
        check_alone(found, alone)


def test_packed_sequences_are_segments_where_chunks_hold_several_documents(megatron):
    model = build_model().double()
    generator = np.random.default_rng(10)
    made, lengths = document(4 * M, generator), [M + 3, 2, 2 * M, M - 5]
    text = np.append(made.pop("tokens"), EOD)
    segments = np.repeat(range(len(lengths)), lengths)
    batch = collate([{"text": text, "sample_id": 0, **made, "segments": segments}])
    inputs = {**batch.model_inputs(), "attention_mask": None}
    with torch.no_grad():
        expected = model(**batch.model_inputs())
        del inputs["segments"]
        found = model(**inputs, packed_seq_params=packed(lengths))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        hidden = torch.zeros(1, 1, 1, 4 * M, dtype=torch.bool)
        hidden[..., 1] = True  # besides: nobody sees this token
        masked = {**batch.model_inputs(), "attention_mask": hidden.logical_or(
            batch.model_inputs()["attention_mask"])}  # fmt: skip
        found = model(**{**inputs, "attention_mask": hidden}, packed_seq_params=packed(lengths))
        torch.testing.assert_close(found, model(**masked), rtol=0, atol=0)


def gpt_of(retro):
    """A GPT of this model's sizes, with rotary positions."""
    from retro_mcore.model.decoder_model import DecoderModel
    from retro_mcore.model.specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(retro.config)
    return DecoderModel(retro.config, spec, 96, 64, position_embedding_type="rope")


def test_segments_keep_apart_whatever_the_mask(megatron):
    """None, a causal mask, which says nothing of documents, and the mask of RetroBatch."""
    model = build_model().double()
    batch = batch_of([document(n, np.random.default_rng(11)) for n in LENGTHS], **APART)
    inputs = batch.model_inputs()
    causal = torch.ones(2 * batch.tokens.shape[1:], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        expected = model(**inputs)
        for mask in (None, causal):
            found = model(**{**inputs, "attention_mask": mask})
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def positions_of(row):
    return torch.arange(row.size(1)).expand_as(row)


def as_embedded(model, row):
    return {"input_ids": None, "position_ids": None, "attention_mask": None,
            "decoder_input": model.embedding(row, positions_of(row))}  # fmt: skip


def test_packed_sequences_may_come_embedded(megatron):
    """The length is then that of the states; so it is on pipeline stages without tokens."""
    retro = build_model(position_embedding_type="rope")
    for model in (retro, gpt_of(retro)):
        row = torch.from_numpy(np.random.default_rng(12).integers(1, 90, (1, 16)))
        with torch.no_grad():
            embedded, documents = as_embedded(model, row), packed([9, 7])
            expected = model(row, positions_of(row), None, packed_seq_params=documents)
            found = model(**embedded, packed_seq_params=documents)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            for wrong in ([1], [8]):
                with pytest.raises(ConfigurationError, match=r"ends at \d, in a row of 16 tokens"):
                    model(**embedded, packed_seq_params=packed(wrong))
            two = as_embedded(model, row.expand(2, -1))
            with pytest.raises(ShapeError, match="packed_seq_params: given with 2 rows"):
                model(**two, packed_seq_params=documents)
            model.pre_process = model.decoder.pre_process = False  # as a later stage
            model.set_input_tensor([embedded["decoder_input"]])
            found = model(None, None, None, packed_seq_params=documents)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            with pytest.raises(ConfigurationError, match="ends at 1, in a row of 16 tokens"):
                model(None, None, None, packed_seq_params=packed([1]))


def test_padding_of_documents_does_not_balance_experts(megatron):
    """As if the caller had given it as `padding_mask`, with what else that leaves out."""
    experts = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "add_bias_linear": False,
               "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}  # fmt: skip
    model = build_model(**experts).double().train()
    row = torch.from_numpy(np.random.default_rng(13).integers(1, 90, (1, 16)))
    places, apart = packed([8, 8]), packed([5, 6], [8, 8])
    padding = torch.tensor([[0] * 5 + [1] * 3 + [0] * 6 + [1] * 2]).bool()
    besides = (torch.arange(16) == 1)[None]

    def routing(documents, mask):
        model.zero_grad()
        inputs = {"packed_seq_params": documents, "padding_mask": mask}
        model(row, positions_of(row), None, **inputs).sum().backward()
        return model.decoder.layers[1].mlp.router.weight.grad.clone()

    everything = torch.ones_like(padding)
    for found, expected in (
        (routing(apart, None), routing(places, padding)),
        (routing(apart, besides), routing(places, padding | besides)),
        (routing(apart, everything), routing(places, None)),  # none counts, so all do
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(routing(apart, None), routing(places, None))


def ends(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_format": "sbhd"}, r"qkv_format: 'sbhd'"),
        ({"cu_seqlens_q": None}, r"cu_seqlens_q: None"),
        ({"cu_seqlens_q": ends(0, 16)[None]}, r"cu_seqlens_q: torch.int32 of shape \(1, 2\)"),
        ({"cu_seqlens_q": ends(0, 16).bool()}, r"cu_seqlens_q: torch.bool"),
        ({"cu_seqlens_q": [0, 8, 16]}, r"cu_seqlens_q: a list"),
        (
            {"cu_seqlens_q_padded": ends(0, 8, 16).to(torch.uint16)},
            r"cu_seqlens_q_padded: .*uint16",
        ),
        (
            {"cu_seqlens_q_padded": ends(0, 200, 100, 255).to(torch.uint8)},
            r"cu_seqlens_q_padded: torch.uint8",
        ),  # differences would wrap
        ({"cu_seqlens_kv": ends(0, 8, 16).cfloat()}, r"cu_seqlens_kv: torch.complex64"),
        ({"cu_seqlens_kv_padded": (0, 8, 16)}, r"cu_seqlens_kv_padded: a tuple"),
        ({"cu_seqlens_q": ends(0, 9, 8, 16)}, r"cu_seqlens_q: \[0, 9, 8, 16\]"),
        ({"cu_seqlens_q": ends(1, 16)}, r"cu_seqlens_q: \[1, 16\]"),
        ({"cu_seqlens_kv": ends(0, 9, 16)}, r"cu_seqlens_kv: \[0, 9, 16\]"),
        ({"cu_seqlens_kv_padded": ends(0, 16)}, r"cu_seqlens_kv_padded: \[0, 16\]"),
        ({"cu_seqlens_q_padded": ends(0, 16)}, r"cu_seqlens_q_padded: 2 numbers"),
        ({"cu_seqlens_q_padded": ends(0, 7, 16)}, r"cu_seqlens_q_padded: \[0, 7, 16\]"),
        ({"cu_seqlens_q_padded": ends(0, 8, 24)}, r"cu_seqlens_q_padded: the last .* ends at 24"),
        ({"cu_seqlens_q": ends(0, 8, 15), "cu_seqlens_kv": None}, r"cu_seqlens_q: .* ends at 15"),
        ({"max_seqlen_kv": 7}, r"max_seqlen_kv: 7, and a document has 8"),
        ({"local_cp_size": 2}, r"local_cp_size: 2 ranks"),
    ],
)
def test_packed_sequences_that_contradict_themselves_are_refused(megatron, changes, message):
    model, tokens = build_model(), torch.zeros(1, 16, dtype=torch.long)
    with pytest.raises(ConfigurationError, match=f"packed_seq_params.{message}"):
        model(tokens, tokens, None, packed_seq_params=packed([8, 8], **changes))


def test_documents_that_would_not_be_kept_apart_are_refused(megatron):
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from retro_mcore import RetroModel, get_retro_decoder_block_spec

    model, tokens = build_model(), torch.zeros(2, 16, dtype=torch.long)
    row, documents = tokens[:1], packed([8, 8])
    apart = {"segments": row, "attention_mask": None}
    for shape in ((3, 7), (1, 15), (2, 16)):
        with pytest.raises(ShapeError, match=rf"segments: shape \({shape[0]}, {shape[1]}\)"):
            model(row, row, None, segments=torch.zeros(shape, dtype=torch.long))
    for given in ({"segments": row}, {"packed_seq_params": documents}):
        with pytest.raises(ConfigurationError, match=r"attention_mask: torch\.float32, together"):
            model(row, row, torch.zeros(1, 1, 16, 16), **given)
    with pytest.raises(ConfigurationError, match="packed_seq_params: given together with segments"):
        model(row, row, **apart, packed_seq_params=documents)
    with pytest.raises(ShapeError, match="packed_seq_params: given with 2 rows"):
        model(tokens, tokens, None, packed_seq_params=documents)
    spec = get_retro_decoder_block_spec(model.config)
    for layer in spec.layer_specs:  # any attention that is not this package's
        layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    other = RetroModel(model.config, spec, 96, 64)
    for name, given in {"segments": apart, "packed_seq_params": {
        "attention_mask": None, "packed_seq_params": documents}}.items():  # fmt: skip
        message = f"{name}: given to layers with DotProductAttention.*--transformer-impl local"
        with pytest.raises(ConfigurationError, match=message):
            other(row, row, **given)
