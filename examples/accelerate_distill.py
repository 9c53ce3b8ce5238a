"""Progressive Distillation of a diffusers UNet2DModel, in a training loop of one's own with Accelerate.

    accelerate launch accelerate_distill.py TEACHER_FOLDER STUDENT_FOLDER

TEACHER_FOLDER holds a pipeline that predicts v, or x, and samples in 8 steps; the student samples in 2.
"""

import copy
import sys

import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler
from torch.utils.data import DataLoader

import pdfast


def distill(
    teacher_folder: str, student_folder: str, images: torch.Tensor, start: int = 8, end: int = 2, epochs: int = 1
) -> list[float]:
    """images: float [n, C, H, W] in [-1, 1]. Returns the losses, update by update."""
    accelerator = Accelerator()
    pipeline = DDIMPipeline.from_pretrained(teacher_folder)
    teacher, schedule = pdfast.adapt(
        pipeline.unet.eval().requires_grad_(False).to(accelerator.device), pipeline.scheduler
    )
    losses = []
    steps = start // 2
    while steps >= end:
        student = copy.deepcopy(teacher).train().requires_grad_(True)
        table = pdfast.build_step_table(schedule, steps, teacher.prediction, "truncated_snr", device=accelerator.device)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
        loader = DataLoader(images, batch_size=16, shuffle=True, drop_last=True)
        student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
        for _ in range(epochs):
            for x in loader:
                loss = pdfast.distillation_loss(student, teacher, x, table).mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        teacher = accelerator.unwrap_model(student).eval().requires_grad_(False)
        steps //= 2
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    if accelerator.is_main_process:
        DDIMPipeline(teacher.unet, scheduler).save_pretrained(student_folder)
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(*distill(sys.argv[1], sys.argv[2], torch.rand(64, 3, 32, 32) * 2 - 1))
    except ValueError as error:  # such as a teacher that predicts eps
        sys.exit(f"error: {error}")
