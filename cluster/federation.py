"""The federation: what the driver and the actors play with, from the configuration alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from algorithms import Instructions, ParameterLayout
from algorithms.core.attacks import Fgsm
from cluster import seeding
from cluster.configuration.choices import build_choice
from cluster.configuration.config import Config
from cluster.exchange import EvaluationChunk, HostSetup
from cluster.flops import LayerFlops, count_activations, held_units
from cluster.guarantee import check_guarantee
from cluster.references import DataError, UserError, default_cache
from cluster.simulation.devices import Devices
from cluster.simulation.shift import partition_of, period_of, rows_of
from cluster.trained_model import TrainedModel
from cluster.transport.words import check_cohort
from cluster.workload.datasets import Dataset, open_dataset, stratified_split
from cluster.workload.inputs import pixels_of, to_input
from cluster.workload.models import ModelError, check_model
from cluster.workload.objectives import Objective
from cluster.workload.own_rows import hold_out
from cluster.workload.partition import Partition
from cluster.workload.partitioners import Partitioner
from cluster.workload.preparing import prepare


class MemoryNeeded(UserError):
    """What the driver has to hold does not fit into its machine."""


@dataclass(frozen=True)
class Federation:
    """Data, partition and initial model of one experiment.

    Attributes:
        config: The configuration.
        dataset: The decoded data set.
        partition: Who owns which rows of the training split.
        validation: Rows held out of the training split.
        shifted: Who owns which rows after the first, second ... shift of the data.
        own: The rows that each client is judged by, where it is by rows of its own.
    """

    config: Config
    dataset: Dataset
    partition: Partition
    validation: np.ndarray
    shifted: tuple[Partition, ...] = ()
    own: Partition | None = None

    @classmethod
    def of(cls, config: Config) -> Federation:
        """Decode the data once, hold validation out, then divide the rest among the clients.

        Raises:
            DataError, PartitionError, ModelError, DeviceError: Naming the key, what was found and the fix.
        """
        federation = cls.divided(config)
        _ = federation.layout  # a model that does not fit the data fails here, before anything starts
        check_guarantee(config, federation.layout)
        federation.check_attacks()
        federation.check_memory(_half_of_memory())
        weights = federation.sizes if config.weighting == "samples" else np.ones_like(federation.sizes)
        check_cohort(config.wire.bits, weights, config.cohort)
        Devices(config).check({name: federation.tier_bytes(name) for name in config.devices.kinds})
        return federation

    @classmethod
    def divided(cls, config: Config) -> Federation:
        """Data and partition alone; the model is built when it is asked for.

        Raises:
            DataError, PartitionError: Naming the key, what was found and the fix.
        """
        dataset = open_dataset(prepare(**prepare_arguments(config)))
        objective = config.build_objective()
        objective.count(dataset)  # data of another kind is told before anything is made of it
        _check_augmentation(config, dataset)
        labels = _labels(objective, dataset)
        section, seed = config.evaluate_clients, config.partition_seed
        share = 0.0 if section.rows == "own" else config.data.validation
        kept, validation = stratified_split(labels, share, seed)
        periods = []
        for period in range(1 + period_of(config.shift, config.rounds)):
            divided = partition_of(config, period)
            partitioner: Partitioner = build_choice("partition", divided.name, divided.options)
            periods.append(
                partitioner.divide(
                    labels,
                    clients=divided.clients,
                    seed=int(divided.seed),
                    groups=dataset.train.groups,
                    available=rows_of(config, period, kept, labels),
                )
            )
        if section.groups and dataset.train.groups is None:
            raise DataError(
                f"evaluate_clients.groups: true, but data.name = {dataset.name!r} has no groups; set "
                "data.group_column"
            )
        own: Partition | None = None
        if section.rows == "own" or section.unseen:
            periods[0], own = hold_out(
                periods[0],
                labels,
                share=config.data.validation - share,
                unseen=section.unseen,
                shots=max(section.shots),
                seed=seed,
            )
        if own is not None and section.rows == "own":
            validation = np.sort(np.concatenate([own.client(c) for c in range(config.population)]))
        return cls(config, dataset, periods[0], validation, tuple(periods[1:]), own)

    @cached_property
    def objective(self) -> Objective:
        """What is learned."""
        return self.config.build_objective()

    @property
    def labels(self) -> np.ndarray:
        """Class of every training sample, int64[N]; where there are none, all are of one."""
        return _labels(self.objective, self.dataset)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of :attr:`labels`."""
        return self.dataset.classes if self.objective.by_class else ("all",)

    @cached_property
    def trained(self) -> TrainedModel:
        """What is trained, with the common initialisation, and what is frozen below it."""
        return TrainedModel.of(self.config, self.dataset)

    @property
    def model(self) -> nn.Module:
        """Its module: the plain one, or one with adapters in it."""
        return self.trained.module

    @property
    def stored_floats(self) -> int:
        """What an object store is sized by: it keeps many copies of the flat vector and one of the base."""
        return self.layout.size + self.trained.frozen_size // 16

    @property
    def floats(self) -> int:
        """Floats of the whole model: the flat vector, and what is frozen."""
        return self.layout.size + self.trained.frozen_size

    @cached_property
    def layout(self) -> ParameterLayout:
        """The model's flat layout, checked by a dry forward on real samples."""
        name, targets = self.config.model.name, self.dataset.train.targets[:2]
        count = self.objective.count(self.dataset)
        check_model(self.model, name, self._example, targets, self.objective, count)
        try:
            layout = ParameterLayout.of(self.model, self._example)
            if self.config.inert and ":" in self.config.algorithm.name:
                return layout  # what a method carries beside the model only its code knows
            return self.config.method.lay_out(layout, self.model, self._example)
        except ValueError as error:
            raise ModelError(f"model.name = {name!r}: {error}") from error

    @cached_property
    def flops(self) -> LayerFlops:
        """Training FLOPs of the plain model's prunable layers."""
        return LayerFlops.of(self.model, self.layout, self._example)

    @cached_property
    def training_bytes(self) -> int:
        """Bytes that training the whole model takes on a device."""
        return self._training_bytes(None)

    def tier_bytes(self, name: str) -> int:
        """Bytes that training takes on a device of a tier: less where it trains a part of the model alone."""
        part = self.part_of(name) if self.config.method.confined else None
        return self.training_bytes if part is None else self._training_bytes(part)

    def part_of(self, name: str) -> np.ndarray | None:
        """What a tier's first client would be sent of the initial model, bool[trained]; None: all of it."""
        method, own = self.config.method, self.config.devices.kinds[name].sparsity
        # As of round 2, from which on methods cut that send the first model whole.
        told = Instructions(round=2, rounds=self.config.rounds)
        budget = 1.0 - (method.sparsity if own is None else own)
        part = method.submodel(self.initial_weights, told, 0, budget, self.layout)
        return None if part is None else part.numpy()

    def _training_bytes(self, held: np.ndarray | None) -> int:
        """Weights, base, gradient, moments, a batch's activations, of what a client holds, bool[trained]."""
        layout = self.layout
        moments = len(self.config.build_local_optimizer().start(torch.zeros(layout.trained_size)))
        trained = layout.trained_size if held is None else int(np.count_nonzero(held))
        units = {} if held is None else held_units(held, layout)
        activations = self.config.local.batch_size * count_activations(self.model, self._example, units)
        vectors = 1 + (2 if self.config.method.reparameterised else 1) + moments
        return 4 * (self.floats - layout.trained_size + vectors * trained + activations)

    @property
    def kept_bytes(self) -> int:
        """Bytes that one client keeps between its visits."""
        return 4 * sum(self.config.method.keeps(self.layout).values())

    @property
    def updates_bytes(self) -> int:
        """Bytes of a round's updates where the driver holds them all; a rule's vectors are twice as much."""
        if not self.config.keeps_updates:
            return 0
        return self.config.cohort * 4 * self.layout.up_size * (3 if self.config.rule.keeps_updates else 1)

    def check_memory(self, limit: int) -> None:
        """Refuse what the driver would have to hold beyond ``limit`` bytes.

        Raises:
            MemoryNeeded: All clients' states, or all updates of a round where the method asks for them.
        """
        name, clients, cohort = self.config.algorithm.name, self.config.partition.clients, self.config.cohort
        kept, update = self.kept_bytes, 4 * self.layout.up_size
        room = f"half of this machine's memory is {limit / 1e9:,.1f} GB"
        if clients * kept > limit:
            raise MemoryNeeded(
                f"algorithm.name: with {name} each of the {clients:,} clients keeps {kept / 1e6:,.1f} MB: "
                f"{clients * kept / 1e9:,.1f} GB, and {room}; lower partition.clients or the model's size"
            )
        if self.updates_bytes > limit:
            ours = self.config.method.keeps_updates
            key = f"algorithm.name: {name}" if ours else f"aggregation.name: {self.config.aggregation.name}"
            raise MemoryNeeded(
                f"{key} looks at every update of a round: {cohort:,} of {update / 1e6:,.1f} "
                f"MB, and {room}; lower cohort"
            )

    @cached_property
    def attacked_rows(self) -> dict[str, np.ndarray]:
        """Rows of each split that the model is attacked on, int64, sorted: the same ones all the time.

        Those of train belong to clients; where test data is not to be read, none of it is.
        """
        section, splits = self.config.evaluate_attack, {c.split for c in self.evaluation_chunks(2**30)}
        if not section.every:
            return {}
        rng = seeding.generator(self.config.seed, "robustness")
        clients = rng.permutation(self.partition.clients)[: section.rows]
        held = np.unique(np.concatenate([self.partition.client(int(client)) for client in clients]))
        rows = {
            "test": np.arange(len(self.dataset.test.targets) if "test" in splits else 0),
            "val": np.arange(len(self.validation)),
            "train": held,
        }
        return {
            split: own if len(own) <= section.rows else np.sort(rng.choice(own, section.rows, replace=False))
            for split, own in rows.items()
            if len(own)
        }

    def check_attacks(self) -> None:
        """Refuse an attack on inputs that have no neighbourhood, or farther than their whole range.

        Raises:
            DataError: Naming the key.
        """
        attacks = {"attack": self.config.build_attack()}
        if self.config.evaluate_attack.every:
            attacks["evaluate_attack"] = self.config.build_evaluation_attack()
        stored = self.dataset.train.inputs
        pixels = pixels_of(stored)
        for key, attack in attacks.items():
            if attack.active and pixels is None:
                raise DataError(
                    f"{key}.name: {getattr(self.config, key).name} moves images, clips or tables by small "
                    f"amounts, and the inputs of data.name = {self.dataset.name!r} are codes, such as "
                    f"tokens ({stored.dtype}); leave the section out"
                )
            bounded = pixels is not None and pixels.high < math.inf
            if bounded and isinstance(attack, Fgsm) and attack.norm == "linf" and attack.epsilon > 1.0:
                raise DataError(
                    f"{key}.epsilon: {attack.epsilon:g}, but a pixel ranges over 1; allowed are 0 to "
                    f"1, {attack.epsilon:g} of 255 steps are {attack.epsilon / 255:.4f}"
                )

    @property
    def _example(self) -> Tensor:
        return to_input(self.dataset.train.inputs[:2], torch.device("cpu"))

    @property
    def initial_weights(self) -> Tensor:
        """The common initialisation as a flat vector, float32[size]."""
        return self.layout.flatten(self.model)

    @property
    def sizes(self) -> np.ndarray:
        """Samples of every client, int64[clients]."""
        return self.partition.sizes

    def sizes_in(self, period: int) -> np.ndarray:
        """Samples of every client after so many shifts of the data, int64[clients]."""
        return self.shifted[period - 1].sizes if period else self.sizes

    @property
    def selection_metric(self) -> str:
        """What the best checkpoint is chosen by, in a line: on validation data where some was held out."""
        return f"{'val' if len(self.validation) else 'test'}/{self.objective.selects.key}"

    def evaluation_chunks(self, rows: int) -> list[EvaluationChunk]:
        """The test split (once more for each tier's budget) and the validation rows, in fixed chunks."""
        whole: list[tuple[str, int, str | None]] = [("val", len(self.validation), None)]
        if self.config.evaluate_on == "test":
            test = len(self.dataset.test.targets)
            tiers = [n for n, tier in self.config.devices.tiers.items() if tier.sparsity is not None]
            whole = [("test", test, None), *whole, *(("test", test, name) for name in tiers)]
        return [
            EvaluationChunk(split, start, min(start + rows, length), tier)
            for split, length, tier in whole
            for start in range(0, length, rows)
        ]

    def setup(self) -> HostSetup:
        """What an actor needs to play any client."""
        return HostSetup(
            config=self.config,
            folder=self.dataset.folder,
            partition=self.partition,
            validation=self.validation,
            shifted=self.shifted,
            attacked=self.attacked_rows,
            own=self.own,
            base=self.trained.base,
        )


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _labels(objective: Objective, dataset: Dataset) -> np.ndarray:
    targets = dataset.train.targets
    return targets if objective.by_class else np.zeros(len(targets), np.int64)


def _check_augmentation(config: Config, dataset: Dataset) -> None:
    """Only images can be cropped and mirrored, and of a crop something of the image has to be left.

    Raises:
        DataError: Naming the key, what was found and what is allowed.
    """
    augment, shape = config.local.augment, dataset.input_shape
    if (augment.crop or augment.flip) and len(shape) != 3:
        raise DataError(
            f"local.augment: crop {augment.crop}, flip {str(augment.flip).lower()}, but samples of data.name "
            f"= {dataset.name!r} have shape {list(shape)}; allowed are images [channels, height, width]"
        )
    if augment.crop and augment.crop >= min(shape[1:]):
        raise DataError(
            f"local.augment.crop: {augment.crop} pixels around images of {shape[1]}x{shape[2]}; allowed are "
            f"fewer than {min(shape[1:])}"
        )


def prepare_arguments(config: Config) -> dict[str, Any]:
    """What ``prepare`` needs to decode the data set on a node."""
    data, objective = config.data, config.build_objective()
    cache = Path(data.cache) if data.cache else default_cache()
    return {
        "name": data.name,
        "path": data.path,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "text_column": data.text_column,
        "group_column": data.group_column,
        "columns": data.columns,
        "image_size": data.image_size,
        # A path stands instead of the hub, also where a preset names a revision of it.
        "revision": None if data.path else data.revision,
        "data_dir": None if data.path else data.data_dir,
        "train_split": data.train_split,
        "test_split": data.test_split,
        "features": data.features,
        "exclude_classes": data.exclude_classes,
        "takes_text": objective.takes_text,
        "targets": objective.targets,
        "tokenizer": data.tokenizer,
        "length": data.length,
        "cache_dir": cache,
    }
