"""What each field of a config means: for `fmembed fields`, and for the table in docs/reference.md.

Types, choices and defaults are the spec's own (spec.py).
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fmembed.errors import SpecError
from fmembed.spec import RunSpec, list_fields

MEANINGS = {
    "source.uri": "file, folder, glob, fsspec URL, package:<python package>[/folder], or a hub id "
    "with format: hf; - is standard input",
    "source.name": "what a store calls the dataset, whose uri may be another one each week; its "
    "input column, if none",
    "source.format": "how the files are written; auto goes by their names",
    "source.input": "the column to embed",
    "source.id": "the column of ids; without one relative/path#row, or relative/path where a file "
    "is a row",
    "source.label": "the column that the probes predict; of files in folders of classes the folder",
    "source.split": "the dataset's own train and test",
    "source.carry": "more columns to keep",
    "source.caption": "a column of texts that belong to pictures or sounds, for crossmodal",
    "source.root": "the input column holds paths below this folder or URL",
    "source.encoding_errors": "what becomes of what is no UTF-8: rejected, replaced, left out",
    "source.max_text_bytes": "a text, a line of JSON, a row of CSV, what is carried; at most 1 GiB",
    "source.max_media_bytes": "a picture's or sound's file; at most 1 GiB",
    "source.hf.name": "the configuration of a Hugging Face dataset",
    "source.hf.split": "its split",
    "source.hf.revision": "its revision on the hub",
    "source.hf.streaming": "read it as it is fetched",
    "source.csv.delimiter": "of CSV and TSV; by the file's name, if none",
    "source.csv.quote": "of CSV; an empty one says that there is none, as in .tsv",
    "source.csv.encoding": "of the text, as Python calls it",
    "model.id": "hub id, folder, or package:<package>/<folder>",
    "model.revision": "of a hub id",
    "model.modality": "which tower of a model that joins several; by the source, if none",
    "model.adapter": "a LoRA adapter (extra lora), merged when the model is loaded",
    "model.dtype": "auto is bfloat16 where the device computes it natively (GPU; CPU with "
    "avx512_bf16 or amx), else float32",
    "model.max_tokens": "where a text is cut; the checkpoint's own limit, if none",
    "model.prompt": "before every text: a name that the checkpoint defines, or the text itself",
    "model.pooling": "how states become a vector; the checkpoint's own way, if none",
    "model.layer": "which hidden states; the last, if none",
    "model.normalize": "to length one; as the checkpoint says, if none",
    "model.dims": "keep the first dimensions (Matryoshka)",
    "model.precision": "how numbers are stored; float32, if none",
    "model.outputs": "several columns in one pass, by name: pooling, layer, normalize, dims, "
    "precision of each",
    "model.endpoint.base_url": "a server that speaks OpenAI's embeddings protocol",
    "model.endpoint.api_key_env": "the environment variable that holds its key",
    "model.endpoint.dimensions": "of its vectors, where it lets one choose",
    "model.endpoint.batch_rows": "texts of a request",
    "model.endpoint.concurrency": "requests at once",
    "model.endpoint.max_retries": "of a request",
    "model.endpoint.timeout_s": "of a request, in seconds",
    "model.endpoint.usd_per_million_tokens": "its price",
    "model.attn_implementation": "of transformers; chosen by the model and the device, if none",
    "model.compile": "by torch.compile",
    "model.trust_remote_code": "run code that comes with the checkpoint",
    "preprocess.max_image_px": "pixels of a picture: by its header, and as the checkpoint's "
    "processor would resize or pad it",
    "preprocess.max_audio_s": "seconds of a sound",
    "preprocess.max_audio_samples": "of all channels",
    "preprocess.chunk_tokens": "cut long texts into chunks of so many tokens",
    "preprocess.chunk_overlap": "tokens that a chunk shares with the one before",
    "preprocess.window_s": "cut long sounds into windows of so many seconds",
    "preprocess.window_overlap_s": "seconds that a window shares with the one before",
    "preprocess.pieces": "each chunk or window a row, or their mean; auto: rows of chunks, the "
    "mean of windows",
    "preprocess.keep_text": "each chunk's text as the column piece_text; yes where chunks are "
    "rows, if none",
    "compute.actors": "processes with the model: a number, or [min, max]; auto: as many as there "
    "are GPUs, or as the pools of the cluster may come to have, or by the CPUs",
    "compute.gpus_per_actor": "auto: 1 where there are GPUs, or a pool of the cluster has them, "
    "else 0",
    "compute.pools": "in their place actors of several kinds, each with actors, gpus_per_actor, "
    "accelerator_type, resources, label_selector, dtype, price_per_device_hour; all draw from the "
    "same windows",
    "compute.min_agreement": "cosine of the vectors that a pool makes of some rows to those that a "
    "CPU, or the first pool, makes of them; 0.9999, and 0.999 of 16 bits, if none",
    "compute.batch_tokens": "tokens of a batch; auto measures texts",
    "compute.window_rows": "rows that an actor is handed at once",
    "compute.budget.device_hours": "a run stops there, and the next one goes on",
    "compute.budget.cost": "the same, in the currency of the price",
    "compute.price_per_device_hour": "what an hour of an actor's device costs, in any currency",
    "compute.wait_s": "seconds for which a run without a device waits for one; for as long as it "
    "takes, if none",
    "output.uri": "folder or URL of the table",
    "output.store": "in its place a store: a table for each dataset and model, one version of them "
    "promoted",
    "output.commit_every_s": "auto: a quarter of a minute, soon 40 s, and in a long run a "
    "fiftieth of the time it has taken so far; whatever is set, a commit that took seconds is "
    "followed by as much work",
    "output.part_bytes": "bytes of rows that make a part",
    "output.max_rejected_fraction": "of rows that may be rejected before the run stops; where it "
    "is left open, some of fewer than ten rows may",
    "output.on_changed": "rows whose input or carried columns (labels too) are not what the table "
    "holds under their id: refuse embeds what is new, leaves them as they are and ends with "
    "exit 1; keep says so and ends with 0",
    "output.keep_days": "versions that were the newest one at some time of so many days are kept; "
    "null: for ever",
    "output.keep_versions": "so many of the newest versions are kept",
    "refresh.on_rejected": "a row of the table that cannot be embedded any more stays, or leaves",
    "refresh.max_removed_fraction": "where more rows would leave than this share of the table, "
    "none does",
    "gate.margin": "how much less a probe may show than of the promoted version: of the same model "
    "it must be sure that it is less, of another one ruled out, by a paired bootstrap",
    "gate.max_rejected_increase": "by how much more of the rows may be rejected, as a share",
    "gate.max_copies_increase": "by how much more of the inputs may share another one's vector",
    "gate.max_repeated_increase": "by how much more of the rows may have another row's content",
    "gate.max_lost_fraction": "how many rows fewer another table may have, as a share",
    "gate.max_mean_cosine": "of pairs of rows: over it all vectors are one",
    "gate.min_neighbours": "of another model, where no probe judges both: what share of the ten "
    "nearest rows must be the old ones too; noise has none",
    "gate.same_dim": "whether vectors of another length are refused, which an index cannot take",
    "gate.max_arrival_auc": "how well what arrived may be told from what was there, 0.5 to 1; "
    "null: it is only told",
    "probes": "what the vectors are tested by",
    "zeroshot.templates": "texts with {} where the class goes; the modality's own, if none",
    "zeroshot.classes": "words for a label, by label",
    "cluster.name": "of the job and of all that belongs to it: at most 36 of a-z, 0-9 and -",
    "cluster.provider": "whose machines; decides types, spot labels and taints where they are left "
    "open",
    "cluster.image": "with fmembed and its version of Ray in it; Kubernetes needs one, Ray's "
    "launcher installs from the lock, if none",
    "cluster.command": "what a run does",
    "cluster.if_locked": "what it does where another run is writing the table",
    "cluster.schedule": "when: minute, hour, day of the month, month, day of the week",
    "cluster.timezone": "of the schedule",
    "cluster.namespace": "of Kubernetes",
    "cluster.service_account": "whom the machines act as: a ServiceAccount, an instance profile "
    "(aws), an address (gcp), an identity (azure)",
    "cluster.secret": "a Kubernetes Secret; all of it is environment, or what env names",
    "cluster.env": "names of environment variables, of the Secret or of each machine",
    "cluster.volumes": "by path what is mounted there: a claim, nfs://server/path, or host",
    "cluster.head.cpus": "of the head, on which no task runs",
    "cluster.head.memory_gib": "of the head",
    "cluster.head.machine": "its type, for Ray's launcher; by the provider, if none",
    "cluster.cpu.cpus": "of a worker that reads, prepares and writes; less than its machine has, "
    "which needs some itself",
    "cluster.cpu.memory_gib": "of such a worker",
    "cluster.cpu.machine": "its type, for Ray's launcher; by the provider, if none",
    "cluster.cpu.max": "of them, at most; from none",
    "cluster.gpu.gpus": "of a worker with the model",
    "cluster.gpu.accelerator": "their type; L4, on azure T4, on premise any, if none",
    "cluster.gpu.cpus": "of such a worker",
    "cluster.gpu.memory_gib": "of such a worker",
    "cluster.gpu.machine": "its type; by provider, accelerator and number, if none",
    "cluster.gpu.max_spot": "spot workers, which come first; 4, on premise 0, if none",
    "cluster.gpu.max_on_demand": "and on-demand ones, of the same shape",
    "cluster.gpu.selector": "labels of nodes with such GPUs; the provider's, if none",
    "cluster.gpu.taints": "of nodes with GPUs, as key=value:NoSchedule; the provider's, if none",
    "cluster.gpu.spot_selector": "labels of spot nodes; the provider's, if none",
    "cluster.gpu.spot_taints": "of spot nodes; the provider's, if none",
    "cluster.idle_s": "seconds after which an idle worker goes",
    "cluster.drain_s": "seconds for which Ray drains a worker that has to go",
    "cluster.grace_s": "seconds after which it is killed: at least 15 more than drain_s",
    "cluster.deadline_s": "seconds after which an attempt is ended, whatever it does",
    "cluster.start_deadline_s": "seconds within which the head has to be up, and a missed time of "
    "the schedule is made up for",
    "cluster.backoff_limit": "attempts after the first, each on a cluster of its own",
    "cluster.ttl_s": "seconds for which the cluster stays after the job, for its logs",
    "cluster.launcher.region": "where; us-west-2, us-west1, westus2, if none",
    "cluster.launcher.zone": "within it; of gcp the first, else any, if none",
    "cluster.launcher.project": "of gcp, which needs it",
    "cluster.launcher.resource_group": "of azure",
    "cluster.launcher.head_ip": "on premise",
    "cluster.launcher.worker_ips": "on premise",
    "cluster.launcher.ssh_user": "as whom machines are reached",
    "cluster.launcher.machine_image": "of their disks; gcp needs it, else Ray's own, if none",
    "cluster.launcher.disk_gib": "of each machine",
    "cluster.launcher.python": "with which the lock is installed",
    "cluster.launcher.checkout": "the folder of fmembed that is copied and installed",
    "cluster.launcher.extras": "of the install, besides the lock",
}  # fmt: skip


@dataclass(frozen=True)
class Described:
    """A field: its dotted name, its default, what it takes (empty where anything) and means."""

    name: str
    default: str
    choices: str
    meaning: str


def describe_fields(part: str | None = None) -> Iterator[Described]:
    """The fields of a part of the config, or of all of it, in its order.

    Args:
        part: As `model`, `source.csv`, or one field.

    Raises:
        SpecError: There is none of that name.
    """
    parts = list(RunSpec.model_fields)
    # A part's required field before what it has besides.
    names = sorted(
        list_fields(), key=lambda n: (parts.index(n.split(".")[0]), not _find(n).is_required())
    )
    if part is not None:
        found = [n for n in names if n == part or n.startswith(f"{part}.")]
        if not found:
            known = sorted({n.rpartition(".")[0] for n in names} - {""} | set(names))
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(parts)}"
            raise SpecError(f"fields: no part or field {part!a:.80}; {hint}")
        names = found
    for name in names:
        field = _find(name)
        yield Described(name, _default(field), _choices(field.annotation), MEANINGS[name])


def _find(name: str) -> FieldInfo:
    model: Any = RunSpec
    *parts, last = name.split(".")
    for part in parts:
        model = next(k for k in _kinds(model.model_fields[part].annotation) if _is_part(k))
    field: FieldInfo = model.model_fields[last]
    return field


def _kinds(annotation: Any) -> list[Any]:
    """What a union is of."""
    is_union = get_origin(annotation) in (typing.Union, types.UnionType)
    return list(get_args(annotation)) if is_union else [annotation]


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value % 2**20 == 0 and value:
        return f"{value // 2**20:,} MiB"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _choices(annotation: Any) -> str:
    """The words that a field takes, where it takes no others."""
    words: list[str] = []
    for kind in _kinds(annotation):
        if get_origin(kind) is Literal:
            words += [str(word) for word in get_args(kind)]
        elif get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
            words += [str(word) for word in get_args(get_args(kind)[0])]
        elif kind is not type(None):
            return ""
    return ", ".join(words)


def lines(part: str | None = None) -> Iterator[str]:
    """The same for people: two lines a field."""
    for field in describe_fields(part):
        takes = f"; {field.choices}" if field.choices else ""
        yield f"{field.name}  ({field.default}{takes})"
        yield f"    {field.meaning}"


def markdown() -> Iterator[str]:
    """The table of docs/reference.md."""
    yield "| field | default | says |"
    yield "| --- | --- | --- |"
    for field in describe_fields():
        default = field.default if field.default in ("required", "none") else f"`{field.default}`"
        takes = ", ".join(f"`{word}`" for word in field.choices.split(", ") if word)
        yield f"| `{field.name}` | {default} | {'; '.join(filter(None, [field.meaning, takes]))} |"
