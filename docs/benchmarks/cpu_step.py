"""One training step and one sampling step of the base `small` in PyTorch on the CPU, to stand beside `cargo xtask bench cpu`.

The model is diffusers' FluxTransformer2DModel with random weights in f32, the LoRA is peft's, the base is frozen, attention is
PyTorch's scaled_dot_product_attention. A training step is what a step of the recipe is: noising, forward, weighted
loss, backward, clipping by global norm, AdamW. Nothing but the LoRA gets gradients. A sampling step is a forward pass without
gradients for one picture (and, as a second figure, for a batch of four) and the Euler update.

Needs torch, diffusers and peft (the oracle's environment). By itself it prints one JSON document; with --serve it says
what it is and then answers lines such as "training_step 4" with the times of so many steps, so that `cargo xtask bench
cpu --python FILE` can let both sides take turns.
"""

import argparse
import json
import statistics
import sys
import time

import diffusers
import peft
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

TEXT_TOKENS = 64
LATENT_CELLS = 32  # 128 px, VAE /4
BATCH = 4
RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def model():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    ).requires_grad_(False)


def inputs(batch):
    side = LATENT_CELLS // 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None, :]
    return {
        "hidden_states": torch.randn(batch, side * side, 64),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 64),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.rand(batch),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "return_dict": False,
    }


def times_of(step, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def training(transformer):
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    given = inputs(BATCH)
    latents = given.pop("hidden_states")

    def step():
        transformer.train()
        noise = torch.randn_like(latents)
        sigma = given["timestep"][:, None, None]
        noisy = (1 - sigma) * latents + sigma * noise
        velocity = transformer(hidden_states=noisy, **given)[0]
        loss = ((velocity - (noise - latents)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def sampling(transformer, batch):
    given = inputs(batch)
    latents = given.pop("hidden_states")

    @torch.inference_mode()
    def step():
        transformer.eval()
        return latents - 0.02 * transformer(hidden_states=latents, **given)[0]

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain, adapted = model(), model()
    adapted.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    steps = {
        "training_step": training(adapted),
        "sampling_step": sampling(plain, 1),
        "sampling_step_of_4": sampling(plain, BATCH),
        # Unmerged, as load_lora_weights leaves it.
        "sampling_step_with_lora": sampling(adapted, 1),
    }
    about = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "threads": torch.get_num_threads(),
    }
    if options.serve:
        print(json.dumps(about), flush=True)
        for line in sys.stdin:
            figure, repeats = line.split()
            print(json.dumps(times_of(steps[figure], int(repeats))), flush=True)
        return
    for figure, step in steps.items():
        times_of(step, 3)
        times = times_of(step, options.repeats)
        about[figure] = {"median_s": statistics.median(times), "least_s": min(times), "repeats": options.repeats}
    print(json.dumps(about))


if __name__ == "__main__":
    main()
