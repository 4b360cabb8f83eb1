"""Recipes for Macs of a size, as plain data: widths of the release's modules, layer by layer.

"4g64*2 3g128" stands for two layers with 4 bits in groups of 64, then one with 3 bits in groups of 128. Layers without
the module are counted, too. The sizes leave room for a prefix of 4,096 tokens and a workspace, as `info` counts them,
in what macOS gives a GPU: two thirds of 16 and 24 GB, three quarters of 36 GB.

They were not measured on the release: sensitivities of the bundled demo, by kind of module and by relative depth, were
put on the release's sizes, and the knapsack of `search` chose. A search on the release itself knows better.
"""

MACS: dict[str, dict[str, str]] = {
    "mac-16gb": {
        "embed_tokens": "3g128",
        "self_attn.q_proj": "3g128*25 4g128*4 3g128",
        "self_attn.k_proj": "4g128*17 5g128*10 6g128*3",
        "self_attn.v_proj": "4g128*14 4g64 5g128*4 5g64*10",
        "self_attn.o_proj": "4g128*18 4g64*3 5g128*2 4g64 5g128 4g64 4g128*3 3g128",
        "mlp.gate_proj": "3g128*21 4g128*6 3g128*3",
        "mlp.up_proj": "3g128*5 2g128*9 3g128*16",
        "mlp.down_proj": "4g64*8 3g64*6 4g64*12 3g64*4",
        "router.proj": "8g128*22 8g64*2 8g128*6",
        "experts.gate_up_proj": "2g128*30",
        "experts.down_proj": "2g64*30",
        "self_conditioning.gate_proj": "2g128",
        "self_conditioning.up_proj": "2g128",
        "self_conditioning.down_proj": "3g64",
    },
    "mac-24gb": {
        "embed_tokens": "6g64",
        "self_attn.q_proj": "8g128 6g64*15 8g128 6g64 8g128*12",
        "self_attn.k_proj": "8g64*3 8g128*7 8g64*20",
        "self_attn.v_proj": "8g128*14 8g64*15",
        "self_attn.o_proj": "8g128*5 6g64 8g128*5 6g64 8g128*17 6g64",
        "mlp.gate_proj": "6g128*20 8g128*7 6g128*3",
        "mlp.up_proj": "6g128*6 5g128*7 6g128*17",
        "mlp.down_proj": "8g64*26 6g64*4",
        "router.proj": "8g128*21 8g64*5 8g128*4",
        "experts.gate_up_proj": "3g128*17 4g128*6 5g128 4g128*5 3g128",
        "experts.down_proj": "5g64 4g64*29",
        "self_conditioning.gate_proj": "4g128",
        "self_conditioning.up_proj": "4g128",
        "self_conditioning.down_proj": "8g64",
    },
    "mac-36gb": {
        "embed_tokens": "8g64",
        "self_attn.q_proj": "8g64*30",
        "self_attn.k_proj": "8g64*30",
        "self_attn.v_proj": "8g64*29",
        "self_attn.o_proj": "8g64*30",
        "mlp.gate_proj": "8g64*30",
        "mlp.up_proj": "8g64*30",
        "mlp.down_proj": "8g64*30",
        "router.proj": "8g64*30",
        "experts.gate_up_proj": "8g128*4 6g64*10 8g128*16",
        "experts.down_proj": "8g64*30",
        "self_conditioning.gate_proj": "8g64",
        "self_conditioning.up_proj": "8g64",
        "self_conditioning.down_proj": "8g64",
    },
}
