"""An answer does not depend on the questions that are answered with it.

Whoever evaluates on a larger GPU, with more questions a batch, would get other scores.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_mcore.data.instruction.examples import InstructionExample
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.sampling import SamplingOptions
from tests.unit.evaluation.loaded import loaded_model
from tests.unit.inference.small import small_model

pytestmark = pytest.mark.usefixtures("megatron")

TEXT = st.text("abcdefgh ?.", min_size=1, max_size=30)
EXAMPLES = st.builds(
    InstructionExample,
    st.just("nq"),
    st.just("record"),
    TEXT,
    st.tuples(TEXT),
    st.lists(TEXT, min_size=2, max_size=4).map(tuple),
)
SAMPLINGS = st.builds(
    SamplingOptions,
    st.sampled_from([0.0, 0.7, 1.5]),
    st.sampled_from([0, 5]),
    st.sampled_from([1.0, 0.8]),
    st.integers(0, 2**40),
)


@pytest.fixture(scope="module")
def model(megatron):
    # In double precision: batches sum in another order, which may not choose another token.
    return small_model().double()


def answered(model, folder, examples, asked, neighbors, batch_size):
    from retro_mcore.evaluation.predictions import predict
    from retro_mcore.evaluation.question_answering import QuestionAnswerer

    loaded = loaded_model(neighbors == "live", model)
    answerer = QuestionAnswerer(loaded, examples, asked, neighbors)
    path = folder / f"{batch_size}.jsonl"
    predict(path, len(examples), batch_size, {}, answerer.answer, "")
    return path.read_bytes()


@settings(
    deadline=None,
    derandomize=True,
    max_examples=6,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_neither_answers_nor_counts_depend_on_the_batch(model, tmp_path_factory, data):
    from retro_mcore.evaluation.question_answering import QAOptions

    examples = data.draw(st.lists(EXAMPLES, min_size=2, max_size=6))
    neighbors = data.draw(st.sampled_from(["live", "passages", "none"]))
    asked = QAOptions(
        prompt_format="reformat_prompt_short",
        num_context_passages=data.draw(st.integers(0, 1)),
        max_new_tokens=data.draw(st.integers(1, 20)),
        sampling=data.draw(SAMPLINGS),
        stop=data.draw(st.sampled_from([(), ("a", "bc")])),
        two_chunks=data.draw(st.booleans()),
    )
    folder = tmp_path_factory.mktemp("answers")
    alone = answered(model, folder, examples, asked, neighbors, 1)
    for batch_size in data.draw(st.permutations([2, 3, 4, 7]))[:2]:
        together = answered(model, folder, examples, asked, neighbors, batch_size)
        assert together == alone, f"--micro-batch-size {batch_size}"


def test_another_batch_size_is_refused_by_its_flag(model, tmp_path):
    """A run that goes on has batches of the size that it began with."""
    from retro_mcore.evaluation.predictions import predict

    rows = [{"id": 0, "pred": ""}]
    predict(tmp_path / "p.jsonl", 1, 2, {}, lambda places: rows, "")
    with pytest.raises(ConfigurationError, match=r"--micro-batch-size: .* with 2, asked for 3"):
        predict(tmp_path / "p.jsonl", 1, 3, {}, lambda places: rows, "")
