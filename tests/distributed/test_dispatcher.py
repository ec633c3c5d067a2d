"""Experts on several ranks beside the same layer in one process; `op_ranks.py` is what they run."""

import pytest

E, K, D = 8, 3, 8


def test_null_experts_and_given_up_choices_are_not_sent(ops):
    """Nor is anything else: the bytes are those of rows that leave, and of answers that return."""
    for error, difference, away in ops["sentinels"]:
        assert error < 1e-12
        assert difference == 0
        assert away > 0


def test_lora_of_the_experts(ops):
    assert all(error < 1e-12 for error in ops["lora"])


def test_lora_is_merged_but_not_added_on_several_ranks(ops):
    for error, refused in ops["merged_lora"]:
        assert error < 1e-12
        assert refused == (
            "RuntimeError: LoRA must be added before the experts are split between ranks"
        )


def test_quantised_experts_with_lora(ops):
    for error, share, same in ops["quantized"]:
        assert error < 1e-5
        assert share == 1
        assert same


def test_quantised_experts_are_not_sharded_by_fsdp(ops):
    assert all(
        text.startswith(
            "ValueError: data ('shard') must be 'replicate' where experts are quantised"
        )
        and "their weights are buffers" in text
        for text in ops["quantized_shards"]
    )


def test_autocast_sends_sixteen_bits(ops):
    assert all(error < 1e-2 and difference == 0 for error, difference in ops["autocast"])


def test_compiled_layer(ops):
    assert all(error < 1e-12 for error in ops["compiled_layer"])


@pytest.mark.parametrize("scenario", ["accumulation", "uneven_accumulation"])
def test_gradients_of_several_backwards_add_up(ops, scenario):
    assert all(error < 1e-12 for error in ops[scenario])


def test_gradients_taken_alone_are_of_the_rank_and_change_nothing(ops):
    for untouched, error in ops["gradients_alone"]:
        assert untouched
        assert error < 1e-12


def test_all_ranks_take_part_in_all_sums(ops):
    others = len(ops["sums_together"]) - 1
    assert ops["sums_together"] == [[[1.0], [float(others)]]] * (others + 1)


def test_ranks_with_different_models_are_all_told(ops):
    last = len(ops["another_model"]) - 1
    for rank, (text, untouched) in enumerate(ops["another_model"]):
        assert f"start: rank {last if rank < last else 0} has another model" in text
        assert untouched


def test_experts_that_cannot_be_sharded_are_refused(ops):
    for text in ops["uneven_shards"]:
        assert text.startswith("ValueError: an expert parameter of shape (8, ")


def test_a_buffer_that_nothing_fills_is_refused(ops):
    text = "ValueError: buffer .scratch is on the meta device, and no checkpoint fills it"
    assert set(ops["meta_buffers"]) == {text}


def test_activation_checkpointing(ops):
    assert all(error < 1e-12 for error in ops["recomputation"])


def test_second_derivatives_are_refused_by_name(ops):
    for text in ops["second_derivatives"]:
        assert text.startswith("NotImplementedError: dispatch of ")
        assert "does not support second derivatives (create_graph=True)" in text


def test_gradients_needed_on_one_rank_only(ops):
    assert all(error < 1e-12 for error in ops["frozen_on_one_rank"])


def test_buffers_stay_bounded_when_all_tokens_choose_the_same_experts(ops):
    ranks = len(ops["bounded_buffers"])
    tokens = sum(5 + 3 * rank for rank in range(ranks))
    held = E // ranks
    for rank, (error, rows, chunks, buffer_rows, buffer_bytes) in enumerate(ops["bounded_buffers"]):
        assert error < 1e-12
        # Experts 0 to K - 1 answer everything; rank r holds `held` experts from r * held on.
        assert rows == tokens * max(0, min(K, (rank + 1) * held) - rank * held)
        assert chunks == -(-tokens * min(K, held) // 10)
        assert buffer_rows <= 10 + ranks
        assert buffer_bytes == 8 * D * buffer_rows


def test_transfers_run_during_matmuls(ops):
    """A chunk is multiplied while the next comes and the answers to the last one leave."""
    for log in ops["order"]:
        assert log == [
            "start dispatch 0",
            "wait dispatch 0",
            "start dispatch 1",
            "matmul",
            "start combine 0",
            "wait dispatch 1",
            "matmul",
            "wait combine 0",
            "start combine 1",
            "wait combine 1",
            "start combine 1 back",
            "wait combine 1 back",
            "start combine 0 back",
            "matmul back",
            "start dispatch 1 back",
            "wait combine 0 back",
            "matmul back",
            "wait dispatch 1 back",
            "start dispatch 0 back",
            "wait dispatch 0 back",
        ]


@pytest.mark.parametrize(("place", "what"), list(enumerate(["layer", "gradients", "call"])))
def test_ranks_in_different_calls_all_raise(ops, place, what):
    for rank, text in enumerate(ops["another_call"][0]):
        assert text[place].startswith(f"CollectiveError: rank {rank} of")
        assert f"has {what} " in text[place]
        assert "they are not in the same call" in text[place]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (0, "of layer must be a multiple of the"),
        (1, "num_chunks (0) must be at least 1"),
        (2, "max_rows (0) must be at least 1"),
    ],
)
def test_refuses_what_does_not_fit(ops, place, text):
    assert all(text in texts[place] for texts in ops["refused_dispatchers"])


def test_refuses_a_layer_that_is_parallel_already(ops):
    assert set(ops["twice"]) == {"ValueError: experts must not be parallel already"}
