"""Makes forward and backward of one update on each of two ranks; test_verl_engine.py starts it.

Arguments: model folder, output file. Completions are dealt out one by one, so both ranks hold a
part of each group.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.integrations import verl_host as host


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loss = host.joint_loss(host.actor_config(), kd_coef_schedule="reward_adaptive")
    built = host.engine(model, "kdrl")
    batch = host.rollouts()
    mine = batch.select_idxs(list(range(rank, len(batch), ranks)))
    data = host.update_batch(mine, fused=True, micro_batch=2, global_batch_size=len(batch))
    loss_here, grads = host.gradients(built, data, loss)
    total = torch.tensor(loss_here)
    dist.all_reduce(total)
    if rank == 0:
        torch.save({"loss": total.item() / ranks, "grads": grads}, out)
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
