"""How many answers are right: prompts with known answers, eight of each text family.

    python bench/quality.py                        # the bundled demo, the checkpoint's own sampler
    python bench/quality.py --vision --per-family 30      # pictures and frames
    python bench/quality.py --transformers PATH    # the same prompts through Transformers (needs torch)

Prints a row per family and a last line of JSON. `tasks/` makes the prompts and marks the answers.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import score
import tasks

TEXT = [family for family in tasks.TEXT if family.__name__ != "arithmetic"]  # the model's own weakness


def cases(families: list, per_family: int, seed: int) -> list[dict]:
    """Prompts with their last, expected turn taken off."""
    out = []
    for family in families:
        source = random.Random(f"{family.__name__}-{seed}")
        for _ in range(per_family):
            case = family(source)
            answer = case["messages"][-1]
            out.append(
                {
                    "task": family.__name__,
                    "messages": case["messages"][:-1],
                    "answer": answer.get("content", ""),
                    "thinking": answer.get("thinking"),
                    "tool_calls": answer.get("tool_calls"),
                    "tools": case.get("tools"),
                    "enable_thinking": case.get("enable_thinking", False),
                    "images": case.get("images", []),
                    "video": case.get("video"),
                }
            )
    return out


def ours(args):
    """A function from a case to (answer with markers, denoising steps)."""
    import mlx_dgemma

    engine = mlx_dgemma.load(args.model, dtype=args.dtype)
    changes = {name: value for name, value in (("entropy_bound", args.entropy_bound),) if value is not None}

    def answer(case: dict) -> tuple[str, int]:
        r = engine.generate(
            case["messages"],
            images=case["images"],
            video=case["video"],
            seed=args.seed,
            thinking=case["enable_thinking"],
            tools=case["tools"],
            **changes,
        )
        marked = r.text if not r.tool_calls else engine.tokenizer.decode(r.tokens)
        return marked, r.stats.canvas_positions

    return answer


def transformers(args):
    """The same through Transformers' generate, in float32."""
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    processor = Gemma4ImageProcessorPil.from_pretrained(args.transformers)
    tokenizer = AutoTokenizer.from_pretrained(args.transformers)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(args.transformers, dtype=torch.float32).eval()
    forwards = [0]
    model.model.decoder.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    length = model.config.canvas_length

    def encode(case: dict) -> dict:
        text = tokenizer.apply_chat_template(
            case["messages"],
            tools=case["tools"],
            enable_thinking=case["enable_thinking"],
            add_generation_prompt=True,
            tokenize=False,
        )
        pictures, inputs = case["images"] or case["video"] or [], {}
        if pictures:
            seen = processor(pictures, return_tensors="pt")
            spans = ["<|image>" + "<|image|>" * int(n) + "<image|>" for n in seen.pop("num_soft_tokens_per_image")]
            if case["video"]:
                stamped = " ".join(f"00:{i:02d} {span}" for i, span in enumerate(spans))
                text = text.replace("<|video|>", stamped)
            else:
                head, *tails = text.split("<|image|>")
                text = head + "".join(span + tail for span, tail in zip(spans, tails))
            inputs = dict(seen)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if pictures:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        return {"input_ids": ids, **inputs}

    def answer(case: dict) -> tuple[str, int]:
        torch.manual_seed(args.seed)
        inputs = encode(case)
        ids = inputs["input_ids"]
        forwards[0] = 0
        out = model.generate(**inputs, max_new_tokens=256)
        out = getattr(out, "sequences", out)[0, ids.shape[1] :].tolist()
        ends = set(model.generation_config.eos_token_id)
        cut = next((i for i, token in enumerate(out) if token in ends), len(out))
        text = tokenizer.decode(out[:cut], skip_special_tokens=not case["tool_calls"] and not case["thinking"])
        return text.split("<channel|>")[-1], forwards[0] * length

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the demo)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--per-family", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and generation")
    parser.add_argument("--entropy-bound", type=float)
    parser.add_argument("--vision", action="store_true", help="pictures and frames instead of text")
    parser.add_argument("--transformers", metavar="PATH", help="run Transformers on this checkpoint instead")
    args = parser.parse_args()
    answer = (transformers if args.transformers else ours)(args)
    families = tasks.VISION if args.vision else TEXT
    started, table = time.perf_counter(), {family.__name__: [0, 0, 0] for family in families}
    for case in cases(families, args.per_family, args.seed):
        text, positions = answer(case)
        row = table[case["task"]]
        row[0] += score.right(case, text)
        row[1] += 1
        row[2] += positions
    print(f"{'family':<12}{'right':>6}{'of':>5}{'positions an answer':>22}")
    for name, (right, count, positions) in table.items():
        print(f"{name:<12}{right:>6}{count:>5}{positions / count:>22.0f}")
    right, count, positions = (sum(row[i] for row in table.values()) for i in range(3))
    print(
        json.dumps(
            {
                "runtime": "transformers" if args.transformers else "mlx_dgemma",
                "right": right,
                "count": count,
                "positions_per_answer": round(positions / count, 1),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
