"""Ranks of `test_generation.py`: tokens of two ranks that share experts, beside one process."""

import sys
from pathlib import Path

import torch
from launcher import write

from unimoe_kernels.distributed import (
    count_traffic,
    finish_parallel,
    parallelize_moe,
    start_parallel,
)
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.parallel_generation import generate_in_parallel, load_in_parallel

PAD, IMAGE = 0, 60


def tiny_model():
    torch.manual_seed(7)
    config = UniMoEConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "initializer_range": 0.3,
            "max_position_embeddings": 128,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        num_experts=4,
        num_experts_per_tok=2,
        vision_feature_size=12,
        vision_num_tokens=3,
        video_num_frames=2,
        speech_feature_size=16,
        speech_max_frames=6,
        speech_connector={
            "d_model": 16,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 24,
            "max_target_positions": 8,
        },
        speech_num_queries=4,
        audio_feature_size=10,
        audio_connector={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "cross_attention_frequency": 1,
        },
        audio_num_queries=2,
        media_token_ids={"image": IMAGE, "video": 61, "speech": 62, "audio": 63},
    )
    return UniMoEForConditionalGeneration(config).double().eval()


def prompts(rank):
    """Two prompts of 5 and 9 tokens, padded on the left; or one of 14 with a picture."""
    generator = torch.Generator().manual_seed(rank)
    if rank % 2 == 0:
        ids = torch.randint(3, 60, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        ids[0, :4], mask[0, :4] = PAD, 0
        return {"input_ids": ids, "attention_mask": mask}
    ids = torch.randint(3, 60, (1, 14), generator=generator)
    ids[0, 4:7] = IMAGE
    features = torch.randn(1, 3, 12, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_features": features}


def cases(alone, rank):
    """Options of `generate` by case: lengths that differ, then one rank that stops early."""
    common = {"do_sample": False, "pad_token_id": PAD}
    free = alone.generate(**prompts(rank), **common, max_new_tokens=12, eos_token_id=PAD)
    width = prompts(rank)["input_ids"].shape[1]
    early = free[:, width + 2].tolist() if rank == 0 else [2]
    return {
        "different lengths": common | {"max_new_tokens": 12 - 5 * rank % 10, "eos_token_id": PAD},
        "early stop": common | {"max_new_tokens": 12, "eos_token_id": early},
        "beams": common | {"max_new_tokens": 4 + 2 * rank, "num_beams": 2, "eos_token_id": PAD},
        "sampled": common
        | {"max_new_tokens": 6, "do_sample": True, "top_k": 5, "eos_token_id": PAD},
    }


def seeded(rank):
    torch.manual_seed(50 + rank)


def loaded(alone, folder, rank, mesh):
    """Of one file and of several: whether tokens are the same, and the experts that lie here."""
    options = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 9, "eos_token_id": PAD}
    expected = alone.generate(**prompts(rank), **options)
    found = []
    for name, size in (("whole", "1GB"), ("parts", "20KB")):
        if rank == 0:
            alone.save_pretrained(folder / name, max_shard_size=size)
        torch.distributed.barrier()
        model = load_in_parallel(folder / name, mesh)
        actual = generate_in_parallel(model, prompts(rank), **options)
        (_, moe), *_ = model.moe_layers()
        held = len(moe.experts.down_proj.to_local())
        files = len(list((folder / name).glob("*.safetensors")))
        found.append([torch.equal(actual, expected), held, files])
    return found


def main(folder, rank, world):
    torch.set_num_threads(1)
    alone = tiny_model()
    mesh = start_parallel(
        1, world, timeout=60, init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    shared = parallelize_moe(tiny_model(), mesh)
    results = {}
    for case, options in cases(alone, rank).items():
        seeded(rank)
        expected = alone.generate(**prompts(rank), **options)
        seeded(rank)
        with count_traffic() as traffic:
            actual = generate_in_parallel(shared, prompts(rank), **options)
        results[case] = [torch.equal(actual, expected), actual.shape[1], traffic.sent > 0]
    # Only the last rank has a prompt.
    options = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 9}
    has_prompt = rank == world - 1
    actual = generate_in_parallel(shared, prompts(rank) if has_prompt else None, **options)
    if has_prompt:
        results["no prompts"] = torch.equal(actual, alone.generate(**prompts(rank), **options))
    else:
        results["no prompts"] = actual is None
    try:
        generate_in_parallel(shared, prompts(rank), use_cache=False)
    except ValueError as error:
        results["no cache"] = str(error)
    results["loaded"] = loaded(alone, folder, rank, mesh)
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, results)
    finish_parallel()
    write(folder, rank, {case: [found[case] for found in everyone] for case in results})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
