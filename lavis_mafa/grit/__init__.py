"""GRIT: batches of similar samples, grouped for the next epoch while this one trains (GRIT-VLP, section 4.1); torch only.

An epoch goes like this, on every rank::

    for batch in DataLoader(dataset, batch_size=B, sampler=sampler, drop_last=True):
        ...
        queue.collect(batch["index"], output.image_features, output.text_features)          # phases 1-3
    grouped = gather_from_all_ranks(queue.finish_epoch())                                    # a list, in rank order
    order = next_epoch_order(grouped, N, sampler.block, batch_shuffle=True, generator_seed=epoch,
                             global_batch=sampler.global_batch)                              # phase 4
    sampler.set_order(order, epoch + 1, grouped=True)
"""

from lavis_mafa.grit.grouping import group_by_similarity, group_sub_queues
from lavis_mafa.grit.queue import GritQueue
from lavis_mafa.grit.sampler import GritSampler, next_epoch_order, seeded_generator

__all__ = ["GritQueue", "GritSampler", "group_by_similarity", "group_sub_queues", "next_epoch_order", "seeded_generator"]
