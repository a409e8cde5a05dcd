"""What Ray's launcher would take and a cloud would not, or a careful person would not."""

import difflib
import re
from collections.abc import Iterator

from pear_ray.clusters.instances import (
    GCP_ACCELERATORS,
    INSTANCES,
    Instance,
    with_gpus,
)
from pear_ray.clusters.launcher import (
    AnyLauncher,
    AwsLauncher,
    AzureLauncher,
    CloudLauncher,
    Common,
    GcpLauncher,
    OnPremLauncher,
)
from pear_ray.clusters.market import MARKET_LABEL, ON_DEMAND, SPOT
from pear_ray.clusters.node_configs import GcpNodeConfig

Problem = tuple[str, str]  # dotted field, what is wrong with it and what to do
WORLD = ("0.0.0.0/0", "::/0")
TOKEN_FILE = "auth_token"
TOKEN_MODE = "RAY_AUTH_MODE=token"
# A value stands behind the name of something secret. `..._PATH=`, `$NAME` and three dots hold none.
SECRET = re.compile(
    r"\b(\w*(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|CREDENTIALS)\w*)"
    r"=(?![$\"']*\$|\.\.\.)[\"']?[^\s\"']+"
)


def instance_of(launcher: CloudLauncher, node_type: str) -> Instance | None:
    """What a machine of this type has; None where nobody knows the type."""
    config = launcher.available_node_types[node_type].node_config
    name = config.machine[1]
    known = launcher.metadata.instances.get(name) or INSTANCES[launcher.provider.type].get(name)
    if isinstance(config, GcpNodeConfig) and config.guestAccelerators and known is not None:
        first = config.guestAccelerators[0]
        gpu = GCP_ACCELERATORS.get(first.acceleratorType)
        if gpu is not None and not known.gpus:  # N1 machines have none of their own
            return known.model_copy(update={"gpus": first.acceleratorCount, "gpu": gpu})
    return known


def launcher_problems(launcher: AnyLauncher) -> Iterator[Problem]:
    """What is wrong with a file whose fields are all right."""
    yield from _starts(launcher)
    yield from _token(launcher)
    yield from secrets(launcher)
    yield from _storage(launcher)
    if isinstance(launcher, OnPremLauncher):
        if launcher.metadata.worker is None:
            yield "metadata.worker", "missing; say what each worker has: {cpus, memory_gib, gpus}"
        return
    yield from _types(launcher)
    yield from _closed(launcher)


def _types(launcher: CloudLauncher) -> Iterator[Problem]:
    kinds = launcher.available_node_types
    if launcher.head_node_type not in kinds:
        yield (
            "head_node_type",
            f"{launcher.head_node_type!r} is none of {', '.join(kinds)}",
        )
        return
    for name, kind in kinds.items():
        path = f"available_node_types.{name}"
        if kind.min_workers > kind.max_workers:
            yield (
                f"{path}.min_workers",
                f"{kind.min_workers} is above max_workers={kind.max_workers}",
            )
        yield from _agrees(launcher, name)
    yield from _head(launcher)
    workers = {name: kind for name, kind in kinds.items() if name != launcher.head_node_type}
    gpus = {name: kind for name, kind in workers.items() if kind.resources.get("GPU", 0)}
    if gpus and all(kind.node_config.is_spot or not kind.max_workers for kind in gpus.values()):
        yield (
            "available_node_types",
            (
                f"every type with GPUs ({', '.join(gpus)}) may be taken back, and training has "
                "nowhere to stay; add one that is not spot, with max_workers above 0"
            ),
        )
    least = sum(kind.min_workers for kind in workers.values())
    if least > launcher.max_workers:
        yield "max_workers", f"{launcher.max_workers} is below the sum of min_workers, {least}"


def _agrees(launcher: CloudLauncher, name: str) -> Iterator[Problem]:
    """Whether `resources` and labels say what the machine has."""
    kind, path = launcher.available_node_types[name], f"available_node_types.{name}"
    field, machine = kind.node_config.machine
    instance = instance_of(launcher, name)
    if instance is None:
        known = INSTANCES[launcher.provider.type]
        close = difflib.get_close_matches(machine, known, n=1)
        meant = f"did you mean {close[0]!r}? If not, " if close else ""
        yield (
            f"{path}.node_config.{field}",
            f"{machine!r} is not known; {meant}say what it has under metadata.instances",
        )
        return
    yield from _accelerators(launcher, name, instance)
    if name == launcher.head_node_type:
        return
    cpus, gpus = kind.resources.get("CPU", 0), kind.resources.get("GPU", 0)
    if gpus != instance.gpus:
        larger = [*with_gpus(launcher.provider.type, str(instance.gpu), max(gpus, 1))]
        other = f", or take {larger[0]}" if instance.gpu and gpus and larger else ""
        yield (
            f"{path}.resources.GPU",
            f"{gpus}, and {machine} has {instance.words}; write {instance.gpus}{other}",
        )
    if not 0 < cpus <= instance.cpus:
        yield (
            f"{path}.resources.CPU",
            f"{cpus}, and {machine} has {instance.cpus}; write 1 to {instance.cpus}",
        )
    market = SPOT if kind.node_config.is_spot else ON_DEMAND
    # Without a label a spot node would be one to train on.
    label = kind.labels.get(MARKET_LABEL, ON_DEMAND)
    if label != market:
        said = repr(label) if MARKET_LABEL in kind.labels else "missing"
        yield (
            f"{path}.labels.{MARKET_LABEL}",
            f"{said}, and node_config makes it {market}; write {market}",
        )


def _accelerators(launcher: CloudLauncher, name: str, instance: Instance) -> Iterator[Problem]:
    config = launcher.available_node_types[name].node_config
    if not isinstance(config, GcpNodeConfig):
        return
    path = f"available_node_types.{name}.node_config"
    for each in config.guestAccelerators or []:
        gpu = GCP_ACCELERATORS.get(each.acceleratorType)
        if gpu is None:
            yield (
                f"{path}.guestAccelerators",
                f"{each.acceleratorType!r} is not known; known are {', '.join(GCP_ACCELERATORS)}",
            )
        elif (each.acceleratorCount, gpu) != (instance.gpus, instance.gpu):
            yield (
                f"{path}.guestAccelerators",
                (
                    f"{each.acceleratorCount} {gpu}, and {config.machineType} has "
                    f"{instance.words}; leave it out, the type brings its GPUs"
                ),
            )
    if instance.gpus and config.scheduling.onHostMaintenance != "TERMINATE":
        yield (
            f"{path}.scheduling.onHostMaintenance",
            "a machine with GPUs cannot be moved; write TERMINATE",
        )


def _head(launcher: CloudLauncher) -> Iterator[Problem]:
    name = launcher.head_node_type
    head, path = launcher.available_node_types[name], f"available_node_types.{name}"
    for resource in ("CPU", "GPU"):
        if head.resources.get(resource) != 0:
            yield (
                f"{path}.resources.{resource}",
                (
                    f"{head.resources.get(resource)} lets work run on the head, whose loss ends "
                    "the cluster; write 0"
                ),
            )
    instance = instance_of(launcher, name)
    if instance is not None and instance.gpus:
        yield (
            f"{path}.node_config.{head.node_config.machine[0]}",
            (
                f"{head.node_config.machine[1]} has {instance.words}, and the head uses no GPU; "
                "take a type without"
            ),
        )
    if head.max_workers:
        yield f"{path}.max_workers", f"{head.max_workers} makes workers of the head's type; write 0"
    if head.node_config.is_spot:
        yield f"{path}.node_config", "the head may be taken back, and its loss ends the cluster"


def _closed(launcher: CloudLauncher) -> Iterator[Problem]:
    """Whether a port is open to the world."""
    match launcher:
        case AwsLauncher():
            yield from _aws_closed(launcher)
        case AzureLauncher():
            if not launcher.provider.use_internal_ips:
                yield (
                    "provider.use_internal_ips",
                    (
                        "false gives every machine a public address, and Ray's template opens port "
                        "22 to everyone; write true, and log in from inside the network"
                    ),
                )
        case GcpLauncher():
            for name, kind in launcher.available_node_types.items():
                interfaces = kind.node_config.networkInterfaces or []
                if not interfaces or any(each.accessConfigs for each in interfaces):
                    yield (
                        f"available_node_types.{name}.node_config.networkInterfaces",
                        (
                            "gives the machine a public address (Ray adds one where none are "
                            "named); name a subnetwork, without accessConfigs"
                        ),
                    )


def _aws_closed(launcher: AwsLauncher) -> Iterator[Problem]:
    group = launcher.provider.security_group
    for rule in (group.IpPermissions if group else None) or []:
        ranges = [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]
        for each in ranges:
            address = each.get("CidrIp") or each.get("CidrIpv6")
            if address in WORLD:
                yield (
                    "provider.security_group.IpPermissions",
                    (
                        f"port {rule.get('FromPort')} is open to {address}, which is everyone; "
                        "name your network, or leave the rule out"
                    ),
                )
    for name, kind in launcher.available_node_types.items():
        config = kind.node_config
        if not config.SecurityGroupIds and not config.NetworkInterfaces:
            yield (
                f"available_node_types.{name}.node_config.SecurityGroupIds",
                (
                    "missing: Ray then makes a group that opens port 22 to 0.0.0.0/0; name one of "
                    "yours that lets in its own members and your network"
                ),
            )


def _starts(launcher: Common) -> Iterator[Problem]:
    for field in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        if getattr(launcher, field) is None:
            yield field, "missing: Ray puts in its own, which install another Ray; write []"
    heads = " ".join(launcher.head_start_ray_commands)
    if "--dashboard-host=127.0.0.1" not in heads and "--dashboard-host=localhost" not in heads:
        yield (
            "head_start_ray_commands",
            (
                "the dashboard would listen beyond the head; add --dashboard-host=127.0.0.1 and "
                "reach it with `ray dashboard FILE`"
            ),
        )
    if "--num-cpus=0" not in heads:
        yield "head_start_ray_commands", "work could run on the head; add --num-cpus=0"
    if "--autoscaling-config=" not in heads:
        yield (
            "head_start_ray_commands",
            "no autoscaler would run; add --autoscaling-config=~/ray_bootstrap_config.yaml",
        )


def _token(launcher: Common) -> Iterator[Problem]:
    options = " ".join(launcher.docker.run_options)
    if TOKEN_MODE not in options:
        yield "docker.run_options", f"whoever reaches a port may run code; add -e {TOKEN_MODE}"
    if not any(remote.endswith(f"/{TOKEN_FILE}") for remote in launcher.file_mounts):
        yield (
            "file_mounts",
            (
                "no node would have the token; add /home/pear/.ray/auth_token: ~/.ray/auth_token "
                "(made by `ray get-auth-token --generate`)"
            ),
        )


def secrets(launcher: Common) -> Iterator[Problem]:
    """Values of secrets that stand in the file."""
    for field, text in strings(launcher.model_dump(mode="json")):
        found = SECRET.search(text)
        if found and not found[1].endswith("_PATH"):
            yield (
                field,
                f"{found[1]} is set to a value in the file; bring it by file or environment",
            )


def strings(tree: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string inside `tree`, with its dotted path."""
    if isinstance(tree, str):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from strings(value, f"{path}.{index}")


def _storage(launcher: Common) -> Iterator[Problem]:
    folder = launcher.metadata.shared_storage
    if "://" in folder:
        return
    if not any(folder in command for command in launcher.initialization_commands):
        yield (
            "initialization_commands",
            f"none mounts metadata.shared_storage={folder}, which all nodes are to share",
        )
    if f"-v {folder}:{folder}" not in " ".join(launcher.docker.run_options):
        yield "docker.run_options", f"the container would not see it; add -v {folder}:{folder}"
