"""Greedy causal tokens beside Transformers': every token of 100 answers must be the one that it would take there.

    python bench/causal_reference.py make FILE                        # here: prompts and our tokens
    python bench/causal_reference.py check FILE --checkpoint PATH     # with torch and transformers, without MLX

Prompts have pictures, tools, thinking, several turns, and lengths beyond the sliding window. `check` reads each prompt
with its answer in one pass of the encoder, texts in left-padded batches, so that a token is compared with the most
probable one behind all tokens before it: answers are equal token for token if they all are.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

COUNT, LONG, BATCH = 100, 12, 4  # cases; of them, conversations beyond the window; texts of a batch


def prompts() -> list[dict]:
    """Cases of every family, every third with pictures, and long conversations of earlier ones."""
    import quality
    import tasks

    texts = quality.cases([*quality.TEXT, *tasks.MORE], 4, seed=11)
    pictures = quality.cases(tasks.VISION, 12, seed=11)
    random.Random(0).shuffle(texts)
    made = []
    for i in range(LONG):
        turns = []
        for one in texts[3 * i : 3 * i + 3]:
            turns += [*one["messages"], {"role": "assistant", "content": one["answer"] or "Yes."}]
        made.append({**texts[i], "messages": [turn for turn in turns if turn["role"] != "system"][:-1], "tools": None})
    return [*made, *pictures[:24], *texts][:COUNT]


def make(path: str) -> None:
    import mlx_dgemma

    engine, arrays, cases = mlx_dgemma.load(dtype="float32"), {}, []
    for number, case in enumerate(prompts()):
        asked = {"images": case["images"], "video": case["video"], "tools": case["tools"]}
        options = {"mode": "causal", "temperature": 0, "seed": 0, "max_tokens": 160}
        request = engine.prepare(case["messages"], thinking=case["enable_thinking"], **asked, **options)
        tokens: list[int] = []
        for event in engine.run(request):
            tokens += event.tokens if isinstance(event, mlx_dgemma.Block) else []
        prompt = request.prompt
        arrays[f"{number}.prompt"], arrays[f"{number}.tokens"] = (np.array(a) for a in (prompt.tokens, tokens))
        if prompt.pictures:
            most = max(one.patches.patches.shape[1] for one in prompt.pictures)
            fill = [((0, 0), (0, most - one.patches.patches.shape[1]), (0, 0)) for one in prompt.pictures]
            pairs = list(zip(prompt.pictures, fill))
            arrays[f"{number}.patches"] = np.concatenate([np.pad(a.patches.patches, b) for a, b in pairs])
            arrays[f"{number}.positions"] = np.concatenate(
                [np.pad(a.patches.positions, b, constant_values=-1) for a, b in pairs]
            )
        cases.append({"task": case["task"], "tools": bool(case["tools"]), "turns": len(case["messages"])})
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path, {"cases": json.dumps(cases)})
    window = engine.config.text.sliding_window
    beyond = sum(len(arrays[f"{i}.prompt"]) > window for i in range(len(cases)))
    print(f"{len(cases)} prompts, {sum(len(arrays[f'{i}.tokens']) for i in range(len(cases)))} tokens")
    print(f"{beyond} prompts beyond the window of {window}, {sum('pat' in name for name in arrays)} with pictures")
    print(f"{sum(one['tools'] for one in cases)} with tools, {sum(one['turns'] > 2 for one in cases)} of several turns")


def check(path: str, checkpoint: str) -> None:
    sys.path.remove(str(Path(__file__).parent))  # its kernels.py is not the package that Transformers looks for
    import torch
    import transformers
    from transformers import DiffusionGemmaForBlockDiffusion

    arrays = load_file(path)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.float32).eval()
    numbers = sorted({int(name.split(".")[0]) for name in arrays})
    texts = [i for i in numbers if f"{i}.patches" not in arrays]
    groups = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    groups += [[i] for i in numbers if i not in texts]
    compared, wrong, gap = 0, [], np.inf
    for group in groups:
        wholes = [np.concatenate([arrays[f"{i}.prompt"], arrays[f"{i}.tokens"]]) for i in group]
        longest = max(map(len, wholes))
        ids = torch.tensor(np.array([np.pad(one, (longest - len(one), 0)) for one in wholes]))
        real = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in wholes])
        told: dict = {"input_ids": ids, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        types = (ids == model.config.image_token_id).long()
        if f"{group[0]}.patches" in arrays:
            told["pixel_values"] = torch.from_numpy(arrays[f"{group[0]}.patches"])
            told["image_position_ids"] = torch.from_numpy(arrays[f"{group[0]}.positions"])
            told["mm_token_type_ids"] = types
        embedded = model.get_input_embeddings()(ids)
        told["attention_mask"] = model.model.encoder.create_masks_for_generate(
            model.config, embedded, real, None, None, mm_token_type_ids=types
        )
        with torch.no_grad():
            states = model.model.encoder(**told).last_hidden_state
            cap = model.final_logit_softcapping
            logits = (cap * torch.tanh(model.lm_head(states) / cap)).numpy()
        for row, i in enumerate(group):
            tokens = arrays[f"{i}.tokens"]
            of_answer = logits[row, longest - len(tokens) - 1 : longest - 1]
            wrong += [(i, at) for at in np.flatnonzero(of_answer.argmax(-1) != tokens).tolist()]
            best = np.sort(of_answer, axis=-1)[:, -2:]
            compared, gap = compared + len(tokens), min(gap, float((best[:, 1] - best[:, 0]).min()))
    right = f"{compared - len(wrong)} of {compared} tokens of {len(numbers)} answers"
    print(f"transformers {transformers.__version__}: {right}")
    print(f"the two best tokens are at least {gap:.1e} apart; different: {wrong or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "check"])
    parser.add_argument("file")
    parser.add_argument("--checkpoint")
    args = parser.parse_args()
    make(args.file) if args.command == "make" else check(args.file, args.checkpoint)
