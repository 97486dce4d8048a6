"""A minimal stand-in for Megatron-LM's `megatron.training`, which no registry has.

It calls what `pretrain()` is given in Megatron-LM's documented order, with megatron-core's own
wrapper, optimizer and schedule: arguments; model; datasets; then per step a forward-backward pass
over micro batches from a DataLoader with torch's default collate. Not here: checkpoints, logging,
evaluation, learning rate schedules, Float16Module, and Megatron-LM's own argument checks.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch

DEFAULTS = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "transformer_impl": "local",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": False,
    "padded_vocab_size": 512,
    "check_for_nan_in_loss_and_grad": True,
    "pipeline_model_parallel_size": 1,
    "init_method_std": 0.02,
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "spec": None,
}
SIZES = ("num-layers", "hidden-size", "num-attention-heads", "micro-batch-size", "train-iters")
FIXED_BY_DATA = (
    "seq-length",
    "global-batch-size",
    "seed",
    "eval-interval",
    "eval-iters",
    "max-position-embeddings",
)


class Timers:
    """`timers(name).start()` and `.stop()`."""

    def __call__(self, name, log_level=None):
        return SimpleNamespace(start=lambda barrier=False: None, stop=lambda: None)


class MegatronLM:
    """One release's `megatron.training`.

    Args:
        argv: The command line.
        release: (0, 17), (0, 18) or (0, 19): the signature of `pretrain`.
        **defaults: Arguments as if Megatron-LM's own defaults.
    """

    def __init__(self, argv, release=(0, 17), **defaults):
        self.argv, self.release, self.defaults = argv, release, {**DEFAULTS, **defaults}
        self.losses: list[float] = []
        self.model = None

    @contextmanager
    def installed(self):
        """Make `import megatron.training` find this."""
        import megatron

        training = ModuleType("megatron.training")
        training.get_args = lambda: self.args
        training.get_timers = Timers
        training.pretrain = {
            (0, 17): self.pretrain_to_0_17,
            (0, 18): self.pretrain_0_18,
            (0, 19): self.pretrain_0_19,
        }[self.release]
        arguments = ModuleType("megatron.training.arguments")
        arguments.core_transformer_config_from_args = self.config_from_args
        arguments.parse_and_validate_args = self.parse
        utilities = ModuleType("megatron.training.argument_utils")
        utilities.pretrain_cfg_container_from_args = lambda args: ("container", args)
        modules = {m.__name__: m for m in (training, arguments, utilities)}
        before, argv = dict(sys.modules), sys.argv
        sys.modules.update(modules)
        megatron.training, sys.argv = training, ["pretrain_retro.py", *self.argv]
        try:
            yield self
        finally:
            sys.argv = argv
            del megatron.training
            for name in modules:
                del sys.modules[name]
                if name in before:
                    sys.modules[name] = before[name]

    def parse(self, extra_args_provider=None, args_defaults=None):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for size in SIZES:
            parser.add_argument(f"--{size}", type=int, required=True)
        for name in FIXED_BY_DATA:
            parser.add_argument(f"--{name}", type=int, default=None)
        for name in ("tokenizer-type", "tokenizer-model", "vocab-file", "merge-file", "split"):
            parser.add_argument(f"--{name}", default=None)
        parser.add_argument("--vocab-size", type=int, default=None)
        parser.add_argument("--spec", nargs="*", default=None)
        parser.set_defaults(**{k: v for k, v in self.defaults.items() if k != "spec"})
        parser = extra_args_provider(parser)
        self.args = parser.parse_args(self.argv)
        return self.args

    @staticmethod
    def config_from_args(args, config_class=None):
        from megatron.core.transformer import TransformerConfig

        config_class = config_class or TransformerConfig
        fields = [f.name for f in dataclasses.fields(config_class) if hasattr(args, f.name)]
        return config_class(**{name: getattr(args, name) for name in fields})

    def pretrain_to_0_17(
        self,
        train_valid_test_dataset_provider,
        model_provider,
        model_type,
        forward_step_func,
        process_non_loss_data_func=None,
        extra_args_provider=None,
        args_defaults={},  # noqa: B006 (as there)
    ):
        self.parse(extra_args_provider, args_defaults)
        self.train(train_valid_test_dataset_provider, model_provider, forward_step_func)

    def pretrain_0_18(
        self,
        cfg_container,
        train_valid_test_dataset_provider,
        model_provider,
        model_type,
        forward_step_func,
        process_non_loss_data_func=None,
    ):
        assert cfg_container == ("container", self.args)
        self.train(train_valid_test_dataset_provider, model_provider, forward_step_func)

    def pretrain_0_19(
        self,
        cfg_container,
        train_valid_test_dataset_provider,
        model_type,
        forward_step_func,
        model_provider=None,
    ):
        self.pretrain_0_18(
            cfg_container,
            train_valid_test_dataset_provider,
            model_provider,
            model_type,
            forward_step_func,
        )

    def train(self, datasets_provider, model_provider, forward_step):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection

        from retro_mcore.training.setup.initialize import set_seeds

        args = self.args
        set_seeds(args.seed)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = model_provider(
            pre_process=True, post_process=True, config=None, pg_collection=groups
        )
        ddp = DistributedDataParallelConfig(check_for_nan_in_grad=True)
        self.model = DistributedDataParallel(model.config, ddp, model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2), [self.model])
        assert datasets_provider.is_distributed
        wanted = args.train_iters * args.global_batch_size
        train, _, _ = datasets_provider([wanted, 0, 0])
        batches = range(0, wanted, args.micro_batch_size)
        sampler = [list(range(first, first + args.micro_batch_size)) for first in batches]
        data = iter(torch.utils.data.DataLoader(train, batch_sampler=sampler))
        for _ in range(args.train_iters):
            self.losses.append(self.step(forward_step, data, optimizer))

    def step(self, forward_step, data, optimizer):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        args = self.args
        self.model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=[self.model],
            num_microbatches=args.global_batch_size // args.micro_batch_size,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=None,
            forward_only=False,
        )
        optimizer.step()
        total = torch.stack([report["lm loss"].view(-1) for report in reports]).sum(0)
        assert total.numel() == 2  # [sum of losses, tokens]
        return float(total[0] / total[1])
