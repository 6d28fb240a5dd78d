"""How far diffusers in 16 bits is from itself in f32, on the transformer of reference fixtures.

    python bf16_of_diffusers.py FIXTURES [FIXTURES …]

For each type: error of the velocity with the weights alone rounded, and with everything in that type (norm of the
difference over the norm). Needs torch and diffusers, on the CPU.
"""
import copy
import sys

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file


def velocity(model, inputs, dtype):
    cast = lambda name, v: v.to(dtype) if v.is_floating_point() and not name.endswith("_ids") else v
    with torch.no_grad():
        return model(**{name: cast(name, v) for name, v in inputs.items()}, return_dict=False)[0].float()


for folder in sys.argv[1:]:
    model = FluxTransformer2DModel.from_pretrained(f"{folder}/model/transformer", torch_dtype=torch.float32).eval()
    width = model.config.num_attention_heads * model.config.attention_head_dim
    for case in ("transformer_b1", "transformer_b2"):
        tensors = load_file(f"{folder}/{case}.safetensors")
        inputs = {name[3:]: v for name, v in tensors.items() if name.startswith("in.")}
        expected = tensors["out.velocity"]
        off = lambda found: ((found - expected).norm() / expected.norm()).item()
        for dtype in (torch.bfloat16, torch.float16):
            rounded = copy.deepcopy(model)
            for weight in rounded.parameters():
                weight.data = weight.data.to(dtype).float()
            alone = off(velocity(rounded, inputs, torch.float32))
            whole = off(velocity(copy.deepcopy(model).to(dtype), inputs, dtype))
            print(f"{folder} {case} width {width} {dtype}: weights alone {alone:.1e}, everything {whole:.1e}")
