"""One of several processes that train one adapter: how they meet, and how one is missed.

They hold the same base, adapter and optimizer, compute different spans of a step, and make the same
update from the same sum. Process 0 alone reads settings, writes the run directory and speaks to the
user; what it knows it tells the others.

They are started by torchrun, or by `start_others`. Small things go through torch's key-value store,
where a waiting process also sees which one is gone; tensors through its process group: gloo, and
NCCL between CUDA devices.
"""

import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from phitune.errors import LostProcessError, SettingsError
from phitune.model.device import is_out_of_memory, torch_device
from phitune.plan.machine import check_processes
from phitune.plan.micro_batch import SPANS
from phitune.training.processes import ALONE, Processes
from phitune.training.state import TrainingState
from phitune.training.sums import Span

# Seconds. A process says so often that it is there; one that did not for longer is lost.
_PULSE, _LOST = 2.0, 15.0
# The store answers, and a piece of a tensor arrives, within this time.
_ANSWER = 20.0
# One that was never heard of may still be loading torch, or waiting for its machine.
_COMING = 600.0
# Process 0 waits so long after an error for those who may still ask it why.
_LEAVING = 3.0
# Who waits looks as often, at first and later.
_LOOKS = (0.0005, 0.02)
# Bytes of a tensor that are sent at once, so that slow networks send some piece in time.
_PIECE = 2**26
_LOOPBACK = "127.0.0.1"

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """What torchrun says of this process in its environment."""

    rank: int
    size: int
    local_rank: int  # on its machine
    local_size: int
    address: str  # of the store
    port: int

    @classmethod
    def from_environment(cls) -> "Member | None":
        """None where this process is alone.

        Raises:
            SettingsError: a variable is missing, or is no number.
        """
        given = os.environ.get("WORLD_SIZE") or "1"
        if given == "1":
            return None
        try:
            size, rank = int(given), int(os.environ["RANK"])
            return cls(
                rank,
                size,
                int(os.environ.get("LOCAL_RANK", rank)),
                int(os.environ.get("LOCAL_WORLD_SIZE", size)),
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
            )
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"WORLD_SIZE is {given}, so this is one of several processes, but of its"
                f" environment this cannot be used: {error}; start them with torchrun"
            ) from None

    def environment(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


class Group(Processes):
    """One of several processes.

    Args:
        device: of the tensors that are sent; may be set later, before the first of them.
        listening: where this process holds the store.
        starts_others: this process does, torchrun does not.

    Raises:
        LostProcessError: nothing answers where the store should be.
    """

    def __init__(
        self,
        member: Member,
        device: torch.device | None = None,
        listening: socket.socket | None = None,
        *,
        starts_others: bool = False,
    ) -> None:
        self.rank, self.size = member.rank, member.size
        self.device = device or torch.device("cpu")
        self._member, self._starts_others = member, starts_others
        self._holds_store = listening is not None
        self._others: list[subprocess.Popen[bytes]] = []
        self._meetings = 0
        self._group: Any = None
        self._clerk = Clerk()
        store = self._open_store(listening)
        run = self._name_of_the_run(store)
        self._store: Store = PrefixStore(run, store)
        self._pulse = Pulse(PrefixStore(run, self._open_store()), self.rank, self.size)

    @property
    def on_this_machine(self) -> int:  # type: ignore[override]
        return self._member.local_size

    @property
    def on_this_device(self) -> int:  # type: ignore[override]
        return self._member.local_size if self.device.type == "cpu" else 1

    def _open_store(self, listening: socket.socket | None = None) -> Store:
        """A connection to the store, of which each thread needs one of its own."""
        member = self._member
        try:
            store: Store = dist.TCPStore(  # type: ignore[attr-defined]
                member.address,
                member.port,
                is_master=listening is not None,
                timeout=timedelta(seconds=_COMING if member.rank else _ANSWER),
                wait_for_workers=False,
                master_listen_fd=listening.detach() if listening else None,
            )
        except RuntimeError as error:
            raise LostProcessError(
                f"process {self.rank}: nothing answers at {member.address}:{member.port}, where"
                f" process 0 or torchrun should be: {_first_line(error)}"
            ) from None
        return store

    def _name_of_the_run(self, store: Store) -> str:
        """What separates this start from one before, of which torchrun's store still tells.

        Process 0 makes it up; the others take it once they have seen that it is alive.
        """
        if not _torchrun_has_the_store():
            return "phitune"
        if self.rank == 0:
            name = f"phitune/{uuid.uuid4().hex}"
            store.set("phitune/run", name)
            return name
        seen: dict[str, set[bytes]] = {}
        until = time.monotonic() + _COMING
        while time.monotonic() < until:
            if store.check(["phitune/run"]):
                name = store.get("phitune/run").decode()
                if store.check([f"{name}/pulse/0"]):
                    counts = seen.setdefault(name, set())
                    counts.add(store.get(f"{name}/pulse/0"))
                    if len(counts) > 1:
                        return name
            time.sleep(_PULSE / 4)
        raise LostProcessError(
            f"process {self.rank}: process 0 did not come within {_COMING:.0f} s"
        )

    # ---------------------------------------------------------------------------------------------
    # Small things, through the store.

    @property
    def stopping(self) -> str | None:
        self._check_others()
        asked = self._ask(lambda store: store.get("stop") if store.check(["stop"]) else None)
        return asked.decode() if asked else None

    def ask_to_stop(self, by: str) -> None:
        with suppress(LostProcessError):  # A lost process is reported at the next meeting.
            self._ask(lambda store: store.set("stop", by))

    def tell(self, name: str, said: Any) -> None:
        self._ask(lambda store: store.set(name, json.dumps(said)))

    def hear(self, name: str) -> Any:
        """Waits for what another process tells under a name.

        Raises:
            LostProcessError: one of them is gone.
        """
        (said,) = self._wait_for([name])
        return said

    def meet(self, said: Any) -> list[Any]:
        self._meetings += 1
        self.tell(f"meeting/{self._meetings}/{self.rank}", said)
        heard = self._wait_for([f"meeting/{self._meetings}/{rank}" for rank in range(self.size)])
        # All were at the meeting before this one, so nobody asks for what was said there any more.
        before = f"meeting/{self._meetings - 1}/{self.rank}"
        self._ask(lambda store: store.delete_key(before))
        return heard

    def _wait_for(self, names: list[str]) -> list[Any]:
        pause, longest = _LOOKS
        while not self._ask(lambda store: store.check(names)):
            try:
                self._check_others()
            except LostProcessError:
                if self._ask(lambda store: store.check(names)):
                    break  # It left after it had said all.
                raise
            time.sleep(pause)
            pause = min(2 * pause, longest)
        found = self._ask(lambda store: [store.get(name) for name in names])
        return [json.loads(said) for said in found]

    def _check_others(self) -> None:
        """
        Raises:
            LostProcessError: one of them ended, or does not answer.
        """
        exits = [other.poll() for other in self._others]
        ended = self._ask(lambda store: store.get("ended") if store.check(["ended"]) else None)
        if ended and (said := json.loads(ended))["rank"] != self.rank:
            raise EndedError(said["rank"], said["exit_code"], said["message"])
        for rank, code in enumerate(exits, 1):
            if code is not None:
                raise LostProcessError(_lost(rank, code))
        for rank in self._pulse.lost:
            raise LostProcessError(_lost(rank))

    def _ask(self, question: Callable[[Store], T]) -> T:
        """
        Raises:
            LostProcessError: the store does not answer, or is gone.
        """
        try:
            return self._clerk.ask(lambda: question(self._store), _ANSWER)
        except (RuntimeError, TimeoutError) as error:
            holder = "torchrun's agent" if _torchrun_has_the_store() else "process 0"
            raise LostProcessError(
                f"{holder} is gone, says process {self.rank}: {self._member.address}:"
                f"{self._member.port}: {_first_line(error)}"
            ) from None

    # ---------------------------------------------------------------------------------------------
    # Tensors, through the process group.

    def collect(self, state: TrainingState) -> None:
        """Brings all sums of the current step to process 0, in the order of the processes."""
        sums = state.sums
        heard = self.meet([[span, of_it.done] for span, of_it in sums.spans.items()])
        turn = f"turn/{self._meetings}"
        if self.rank:
            self.hear(f"{turn}/{self.rank}")
            for of_it in sums.spans.values():
                self._send(of_it.found)
            sums.spans.clear()
            return
        for rank in range(1, self.size):
            self.tell(f"{turn}/{rank}", True)
            for span, done in heard[rank]:
                found = state.room_for_a_sum()
                self._receive(found, rank)
                sums.put(span, Span(done, found))

    def spread(self, tensors: Sequence[Tensor]) -> None:
        content = _as_bytes(tensors)
        self.meet("ready for the sum")
        with self._transfer():
            for piece in content.split(_PIECE):
                dist.broadcast(piece, 0)
        if self.rank:
            _from_bytes(content, tensors)

    def _send(self, tensors: Sequence[Tensor]) -> None:
        content = _as_bytes(tensors)
        with self._transfer():
            for piece in content.split(_PIECE):
                dist.send(piece, 0)

    def _receive(self, tensors: Sequence[Tensor], rank: int) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        content = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
        with self._transfer():
            for piece in content.split(_PIECE):
                dist.recv(piece, rank)
        _from_bytes(content, tensors)

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        try:
            if self._group is None:
                self._group = self._open_group()
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._why_it_failed(error) from None

    def _why_it_failed(self, error: Exception) -> LostProcessError:
        """Why a transfer failed: within a while it is known who is gone."""
        until = time.monotonic() + _LOST + 2 * _PULSE
        try:
            while time.monotonic() < until:
                self._check_others()
                time.sleep(_LOOKS[1])
        except LostProcessError as found:
            return found
        return LostProcessError(
            f"process {self.rank}: a sum could not be sent or received: {_first_line(error)}"
        )

    def _open_group(self) -> Any:
        # Else gloo listens where the name of this machine points, which may be nowhere.
        if interface := _interface_towards(self._member.address, self._member.port):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # Else NCCL ends the process where another is gone, and nothing is saved.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=PrefixStore("group", self._open_store()),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=_ANSWER),
        )
        return dist.group.WORLD

    # ---------------------------------------------------------------------------------------------

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        ended = {"rank": self.rank, "exit_code": 0, "message": "it is done"}
        try:
            yield
        except BaseException as error:  # Whatever ends this one, the others are told.
            ended |= {"exit_code": getattr(error, "exit_code", 1), "message": str(error)}
            raise
        finally:
            with suppress(LostProcessError, RuntimeError, TimeoutError):
                self._ask(lambda store: store.compare_set("ended", "", json.dumps(ended)))
                self._leave(_COMING if ended["exit_code"] == 0 else _LEAVING)
            self._pulse.stop()
            for other in self._others:  # They have nothing to write.
                other.kill()
                other.wait()
            if self._group is not None:
                with suppress(RuntimeError):
                    dist.destroy_process_group()

    def _leave(self, seconds: float) -> None:
        """Process 0 waits for those who have to hear how it ended, some of which may still come.

        Those that it started it ends itself; after an error torchrun does.
        """
        self.tell(f"left/{self.rank}", True)
        until = time.monotonic() + seconds
        while self.rank == 0 and not self._starts_others and time.monotonic() < until:
            ranks = {*range(self.size)} - {*self._pulse.lost}
            names = [f"left/{rank}" for rank in ranks]
            if self._clerk.ask(partial(self._store.check, names), _ANSWER):
                return
            time.sleep(_LOOKS[1])

    def start_others(self) -> None:
        for rank in range(1, self.size if self._starts_others else 1):
            member = Member(rank, self.size, rank, self.size, _LOOPBACK, self._member.port)
            # Not from the folder in which the user is, where a file may have the name of a module.
            environment = {**os.environ, **member.environment(), "PYTHONSAFEPATH": "1"}
            self._others.append(
                subprocess.Popen(
                    [sys.executable, "-m", "phitune", "train"],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is process 0's, which tells the others.
                )
            )
        self._pulse.expect_all()


class EndedError(LostProcessError):
    """Another process ended, and said how."""

    def __init__(self, rank: int, exit_code: int, message: str) -> None:
        super().__init__(rank, exit_code, message)
        self.rank, self.exit_code = rank, exit_code

    def __str__(self) -> str:
        return f"process {self.rank} ended: {self.args[2]}"


class Clerk:
    """Asks the store in a thread of its own, so that a machine that is gone is not waited for."""

    def __init__(self) -> None:
        self._waits = False  # for an answer that did not come in time
        self._asked: queue.Queue[tuple[Callable[[], Any], queue.Queue[Any]]] = queue.Queue()
        threading.Thread(target=self._run, name="clerk", daemon=True).start()

    def ask(self, question: Callable[[], T], seconds: float) -> T:
        """
        Raises:
            TimeoutError: there is no answer in that time; nor will there be one to later questions.
            RuntimeError: the store is gone.
        """
        answer: queue.Queue[Any] = queue.Queue(1)
        self._asked.put((question, answer))
        try:
            found = answer.get(timeout=0.0 if self._waits else seconds)
        except queue.Empty:
            self._waits = True
            raise TimeoutError(f"no answer within {seconds:.0f} s") from None
        if isinstance(found, RuntimeError):
            raise found
        return found  # type: ignore[no-any-return]

    def _run(self) -> None:
        while True:
            question, answer = self._asked.get()
            try:
                answer.put(question())
            except RuntimeError as error:
                answer.put(error)


class Pulse:
    """Says again and again that this process is there, and looks whether the others are."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.lost: list[int] = []  # ranks of processes whose pulse stands still
        self._store, self._rank = store, rank
        self._heard: dict[int, bytes] = {other: b"" for other in range(size) if other != rank}
        self._lost_at: dict[int, float] = {}
        self.expect_all()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def expect_all(self) -> None:
        """Those that were never heard of may take their time from now on."""
        until = time.monotonic() + _COMING
        self._lost_at |= {rank: until for rank, heard in self._heard.items() if not heard}

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        looked_at = time.monotonic()
        for count in itertools.count():
            # A process that stood still itself has heard nobody meanwhile.
            stood = time.monotonic() - looked_at - _PULSE
            if stood > _PULSE:
                self._lost_at = {rank: at + stood for rank, at in self._lost_at.items()}
            with suppress(RuntimeError):  # Without the store nobody is heard, and all are lost.
                self._look(count)
            looked_at = time.monotonic()
            self.lost = [rank for rank, at in self._lost_at.items() if looked_at > at]
            if self._stopped.wait(_PULSE):
                return

    def _look(self, count: int) -> None:
        self._store.set(f"pulse/{self._rank}", str(count))
        for rank, before in self._heard.items():
            name = f"pulse/{rank}"
            if self._store.check([name]) and (now := self._store.get(name)) != before:
                self._heard[rank] = now
                self._lost_at[rank] = time.monotonic() + _LOST


def first_process(size: int, device_name: str) -> Processes:
    """Process 0 of a group: of `size` processes, or of those that torchrun has started.

    Raises:
        SettingsError: torchrun has started another number, the device is one for all, or there are
            fewer of it.
    """
    member = Member.from_environment()
    if member is None and size == 1:
        return ALONE
    device, count = torch_device(device_name), member.size if member else size
    check_processes(count, device_name.partition(":")[0])
    if count > SPANS:
        raise SettingsError(f"processes {count}: at most {SPANS} have work in a step")
    if device.type == "cuda":
        _check_cards(device_name, member.local_size if member else size)
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    if member is None:
        listening = socket.create_server((_LOOPBACK, 0))
        member = Member(0, size, 0, size, _LOOPBACK, listening.getsockname()[1])
        return Group(member, device, listening, starts_others=True)
    if member.rank:
        raise SettingsError(
            f"this is process {member.rank} of {member.size}: only process 0 can lead a run, and"
            " phitune train has the others follow; start torchrun with -m phitune train"
        )
    if size not in (1, member.size):
        raise SettingsError(f"processes {size}: torchrun has started {member.size}; leave it out")
    if _torchrun_has_the_store():
        return Group(member, device)
    try:
        return Group(member, device, socket.create_server((member.address, member.port)))
    except OSError as error:
        raise SettingsError(
            f"MASTER_ADDR {member.address}, MASTER_PORT {member.port}: cannot be listened on:"
            f" {error.strerror or error}"
        ) from None


def _check_cards(device_name: str, processes: int) -> None:
    """
    Raises:
        SettingsError: not each process of this machine has a card of its own.
    """
    if ":" in device_name:
        raise SettingsError(
            f"device {device_name}: each process takes a card of its own; use --device cuda, and"
            " CUDA_VISIBLE_DEVICES to choose among them"
        )
    if processes > (cards := torch.cuda.device_count()):
        raise SettingsError(f"processes {processes}: there are {cards} CUDA devices here")


def _interface_towards(address: str, port: int) -> str | None:
    """The network interface by which an address is reached from here."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((address, port))  # Sends nothing.
        here = asking.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if here in (each.address for each in addresses):
                return str(name)
    return None


def _torchrun_has_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _lost(rank: int, exit_code: int | None = None) -> str:
    if exit_code is None:
        return f"process {rank} was not heard of any more"
    if exit_code >= 0:
        return f"process {rank} ended with exit code {exit_code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"process {rank} was killed by {names.get(-exit_code, f'signal {-exit_code}')}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Returns: all of them, end to end [bytes]."""
    return torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])


def _from_bytes(content: Tensor, tensors: Sequence[Tensor]) -> None:
    """Fills tensors of any shape with `content` [bytes]."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    with torch.no_grad():
        for tensor, part in zip(tensors, content.split(sizes), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))
