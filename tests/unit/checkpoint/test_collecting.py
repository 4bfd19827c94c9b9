"""Leases and collecting: no pack that a checkpoint uses is deleted, whatever two processes do at once."""

import random
import threading
from contextlib import ExitStack

import pytest

from tests.unit.checkpoint.checkpoints import NOW_S, Clock, checkpoint, checkpoint_unsafely, flipped, manifest, pack
from tests.unit.checkpoint.checkpoints import repository as opened
from tiered_kv.checkpoint.garbage_collection import CollectionResult
from tiered_kv.checkpoint.leases import SKEW_S, TTL_S, Lease, marker_of
from tiered_kv.checkpoint.repository import Repository
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.store import MemoryStore

GC = f"gc-{'0' * 16}-"
LEASE = f"lease-checkpoint-{'0' * 16}-"


class Watched(MemoryStore):
    """A store that calls `before(operation, names)` before each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.before = lambda operation, names: None

    def put(self, name, buffers):
        self.before("put", [name])
        super().put(name, buffers)

    def get(self, name):
        self.before("get", [name])
        return super().get(name)

    def sizes(self):
        self.before("sizes", [])
        return super().sizes()

    def delete(self, names):
        self.before("delete", names)
        super().delete(names)


def marks(store) -> list[str]:
    return [name for name in store.sizes() if marker_of(name)]


def refusal(call, *arguments) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    return caught.value


class TestLease:
    def test_its_name_has_all_its_state_and_it_is_removed_at_the_end(self):
        repository = opened()
        with repository.lease("restore") as lease:
            (name,) = marks(repository.store)
            assert name == lease.name
            assert marker_of(name) == (name, "restore", int(NOW_S) + TTL_S)
            assert lease.left_s == TTL_S
        assert marks(repository.store) == []

    def test_it_is_removed_after_an_error(self):
        repository = opened()
        with pytest.raises(KeyError), repository.lease():
            raise KeyError
        assert repository.store.sizes() == {}

    def test_renewing_puts_the_new_object_before_removing_the_old_one(self):
        repository = opened(Watched())
        with repository.lease() as lease:
            old = lease.name
            lease.renew()
            assert lease.name == old, "the same second"
            repository.now_s.sleep(400)
            done = []
            repository.store.before = lambda operation, names: done.append((operation, *names))
            lease.renew()
            repository.store.before = lambda operation, names: None
            assert done == [("put", lease.name), ("delete", old)]
            assert marks(repository.store) == [lease.name]
            assert lease.left_s == TTL_S

    def test_an_expired_lease_is_not_renewed(self):
        repository = opened()
        with repository.lease() as lease:
            repository.now_s.sleep(TTL_S)
            error = refusal(lease.renew)
            assert error.kind is Kind.STORAGE
            assert "expired before it was renewed" in str(error)
            assert marks(repository.store) == [lease.name]

    def test_a_lease_that_expires_while_it_is_renewed_is_not_renewed(self):
        repository = opened(Watched())
        with repository.lease() as lease:
            name = lease.name
            repository.now_s.sleep(TTL_S - 1)
            repository.store.before = lambda operation, names: operation == "put" and repository.now_s.sleep(5)
            assert refusal(lease.renew).kind is Kind.STORAGE
            assert marks(repository.store) == [name]

    def test_a_lease_that_cannot_be_removed_expires(self, caplog):
        repository = opened(Watched())

        def fails(operation, names):
            if operation == "delete":
                raise repository.store.failed("delete", "no")

        with repository.lease() as lease:
            repository.store.before = fails
        assert f"the lease {lease.name} could not be removed and stays until it expires" in caplog.text
        repository.store.before = lambda operation, names: None
        assert "another process is working on this store" in repository.collect(1).skipped
        repository.now_s.sleep(TTL_S + SKEW_S)
        assert repository.collect(1) == CollectionResult()
        assert repository.store.sizes() == {}

    def test_repositories_of_one_folder_see_each_others_leases(self, tmp_path):
        repository = opened(FolderStore(tmp_path))
        with repository.lease() as lease:
            assert list(FolderStore(tmp_path).sizes()) == [lease.name]
        assert FolderStore(tmp_path).sizes() == {}

    def test_other_names_are_not_leases(self):
        for name in ("lease-x", "gc-5", "lease-checkpoint-0-5", f"{LEASE}x", f"LEASE{LEASE[5:]}5", f"{GC}5.tkv"):
            assert marker_of(name) is None
        with pytest.raises(ValueError, match="kind: must be lower-case letters"):
            Lease(MemoryStore(), "a-b", Clock())


class TestWaiting:
    def test_a_writer_waits_for_a_collector_and_says_so(self):
        clock, said = Clock(), []
        repository = Repository(MemoryStore(), clock, lambda seconds: repository.store.delete([mark]))
        mark = f"{GC}{int(NOW_S) + 100}"
        repository.store.put(mark, [b"1"])
        with repository.lease(log=said.append) as lease:
            assert list(repository.store.sizes()) == [lease.name]
        assert len(said) == 1
        assert mark in said[0]

    def test_an_expired_mark_is_not_waited_for(self):
        repository = opened()
        repository.store.put(f"{GC}{int(NOW_S) - SKEW_S}", [b"1"])
        with repository.lease():
            assert repository.now_s() == NOW_S
        repository.store.put(f"{GC}{int(NOW_S) - SKEW_S + 1}", [b"1"])
        with repository.lease():
            assert repository.now_s() == NOW_S + 1, "the clocks may differ"

    def test_waiting_is_limited(self):
        repository = opened()
        repository.store.put(f"{GC}{int(NOW_S) + 10**6}", [b"1"])
        error = refusal(repository.lease().__enter__)
        assert error.kind is Kind.STORAGE
        assert "is still there" in str(error)
        assert len(marks(repository.store)) == 1

    def test_a_collector_that_starts_meanwhile_is_seen(self):
        repository, mark = opened(Watched()), f"{GC}{int(NOW_S) + 5}"

        def begin(operation, names):
            if operation == "put" and names[0].startswith("lease"):
                repository.store.objects[mark] = b"1"

        repository.store.before = begin
        with repository.lease():
            assert repository.now_s() >= NOW_S + 5 + SKEW_S

    def test_a_listing_that_never_shows_the_lease_is_refused(self):
        class Frozen(MemoryStore):
            def sizes(self):
                return {}

        repository = opened(Frozen())
        error = refusal(repository.lease().__enter__)
        assert error.kind is Kind.STORAGE
        assert "the listing does not show" in str(error)
        assert repository.collect(1).skipped == "the listing of the store is not up to date"
        assert repository.store.objects == {}


class TestCollect:
    def filled(self, store=None) -> tuple[Repository, list[str]]:
        """Four checkpoints with one own pack each, one of them with a chosen name, and a pack that a crash has left."""
        repository, names = opened(store), []
        for number in range(4):
            names.append(checkpoint(repository, [10 * number], "mine.pkl" if number == 0 else None))
            repository.now_s.sleep(1)
        pack(repository.store, [50, 51])
        return repository, names

    def test_the_newest_and_those_with_chosen_names_are_kept(self):
        repository, names = self.filled()
        gone = pack(MemoryStore(), [10]), pack(MemoryStore(), [50, 51])
        freed = repository.store.sizes()[names[1]] + sum(info.nbytes for info in gone)
        assert repository.collect(keep=2) == CollectionResult(1, 2, freed)
        assert repository.names() == ["mine.pkl", *names[2:]]
        assert not {info.name for info in gone} & set(repository.store.sizes())
        assert repository.verify() == []
        assert repository.collect(keep=2) == CollectionResult()
        assert repository.collect(keep=None) == CollectionResult()

    def test_without_a_number_no_checkpoint_is_deleted(self):
        repository, names = self.filled()
        assert repository.collect(None)[:2] == (0, 1)
        assert repository.names() == names
        assert repository.collect(100) == CollectionResult()
        for keep in (0, -1):
            assert refusal(repository.collect, keep).kind is Kind.CONFIG

    def test_a_shared_pack_is_kept(self):
        repository = opened()
        checkpoint(repository, [0, 1])
        repository.now_s.sleep(1)
        checkpoint(repository, [0, 1, 2])
        assert repository.collect(1)[:2] == (1, 0)
        assert repository.verify() == []

    @pytest.mark.parametrize("mark", [LEASE, LEASE.replace("checkpoint", "restore"), LEASE.replace("checkpoint", "later"), GC])
    def test_nothing_is_deleted_while_another_process_is_working(self, mark):
        repository, _ = self.filled()
        mark += str(int(repository.now_s()) - SKEW_S + 1)
        expired = f"{LEASE}5", f"{GC}5"
        for name in (mark, *expired):
            repository.store.put(name, [b"1"])
        before = set(repository.store.sizes())
        collected = repository.collect(1)
        assert mark in collected.skipped
        assert collected[:3] == (0, 0, 0)
        assert set(repository.store.sizes()) == before - set(expired)
        repository.now_s.sleep(1)
        assert repository.collect(1).skipped == ""

    @pytest.mark.parametrize("at", [0, 8, 12, 40, -1])
    def test_nothing_is_deleted_when_a_manifest_cannot_be_read(self, at):
        for which in (0, 3):
            repository, names = self.filled()
            objects = repository.store.objects
            objects[names[which]] = flipped(objects[names[which]], at % len(objects[names[which]]), bit=1)
            before = dict(objects)
            assert names[which] in repository.collect(1).skipped
            assert objects == before

    def test_nothing_is_deleted_when_a_listed_manifest_does_not_exist(self):
        repository, names = self.filled(Watched())

        def vanish(operation, wanted):
            if operation == "get" and wanted == [names[3]]:
                repository.store.objects.pop(names[3], None)

        repository.store.before = vanish
        before = set(repository.store.sizes())
        assert names[3] in repository.collect(1).skipped
        assert set(repository.store.sizes()) == before - {names[3]}

    def test_a_damaged_checkpoint_can_be_deleted(self):
        repository, names = self.filled()
        repository.store.objects[names[1]] = b"TKVMANIF and no more"
        assert repository.collect(2)[:2] == (1, 2)

    def test_an_unreachable_store_is_an_error_and_the_mark_is_removed(self):
        repository, _ = self.filled(Watched())

        def fails(operation, wanted):
            if operation == "get":
                raise repository.store.failed("get", "no answer")

        repository.store.before = fails
        before = set(repository.store.objects)
        assert refusal(repository.collect, 1).kind is Kind.STORAGE
        assert set(repository.store.objects) == before

    def test_latest_never_names_a_deleted_checkpoint(self):
        repository, names = self.filled(Watched())
        repository.point(names[1])
        seen = []

        def look(operation, wanted):
            if operation == "delete":
                pointed = b"".join(repository.store.objects["LATEST"].split()[2:3]).decode()
                seen.append(pointed in repository.store.objects and pointed not in wanted)

        repository.store.before = look
        repository.collect(1)
        assert seen
        assert all(seen)
        assert repository.pointed() == names[3]

    def test_the_checkpoint_in_latest_is_kept_if_it_is_not_listed_yet(self):
        class Lagging(MemoryStore):
            hidden = ""

            def sizes(self):
                return {name: size for name, size in super().sizes().items() if name != self.hidden}

        repository, names = self.filled(Lagging())
        repository.store.hidden = names[3]
        assert repository.collect(1)[:2] == (1, 2)
        repository.store.hidden = ""
        assert repository.names() == ["mine.pkl", *names[2:]]
        assert repository.verify() == []

    def test_an_expired_mark_stops_the_deleting(self):
        repository, names = self.filled(Watched())

        def slow(operation, wanted):
            if operation == "delete" and wanted[0].endswith((".tkv", ".pack")):
                repository.now_s.sleep(TTL_S + 1)

        repository.store.before = slow
        assert refusal(repository.collect, 1).kind is Kind.STORAGE
        assert [name for name in names if name in repository.store.objects] == ["mine.pkl", *names[2:]]
        repository.store.before = lambda operation, wanted: None
        assert repository.verify() == []


class Turns:
    """Lets two actors alternate after each operation on the store, in an order drawn from a seed."""

    def __init__(self, seed: int, actors: list[str]) -> None:
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._actors = list(actors)
        self._turn = self._random.choice(actors)

    def take(self, actor: str, operation):
        with self._changed:
            self._changed.wait_for(lambda: self._turn == actor)
            try:
                return operation()
            finally:
                self._next()

    def leave(self, actor: str) -> None:
        with self._changed:
            self._actors.remove(actor)
            if self._turn == actor and self._actors:
                self._next()

    def _next(self) -> None:
        self._turn = self._random.choice(self._actors)
        self._changed.notify_all()


class InTurns(MemoryStore):
    """One actor's view of shared objects. A listing may take two turns, like one of several pages."""

    def __init__(self, objects: dict, turns: Turns, actor: str) -> None:
        super().__init__()
        self.objects, self._turns, self._actor = objects, turns, actor

    def put(self, name, buffers):
        self._turns.take(self._actor, lambda: super(InTurns, self).put(name, buffers))

    def get(self, name):
        return self._turns.take(self._actor, lambda: super(InTurns, self).get(name))

    def sizes(self):
        early = self._turns.take(self._actor, super().sizes)
        late = self._turns.take(self._actor, super().sizes)
        middle = "f"
        return {name: size for name, size in early.items() if name < middle} | {name: size for name, size in late.items() if name >= middle}

    def delete(self, names):
        self._turns.take(self._actor, lambda: super(InTurns, self).delete(names))


def run_both(seed: int, write) -> Repository:
    """Run a checkpoint and a collector at once. A crash has left a pack that the checkpoint would reuse."""
    clock, objects = Clock(), {}
    start = Repository(MemoryStore(), clock, clock.sleep)
    start.store.objects = objects
    for number in (0, 10, 20):
        checkpoint(start, [number])
        clock.sleep(1)
    pack(start.store, [30, 31, 32])
    turns = Turns(seed, ["writer", "collector"])

    def run(actor, act):
        try:
            act(Repository(InTurns(objects, turns, actor), clock, lambda seconds: turns.take(actor, lambda: clock.sleep(seconds))))
        except TieredKVError as error:
            failed.append(error)
        finally:
            turns.leave(actor)

    failed: list[TieredKVError] = []
    acts = {"writer": lambda repository: write(repository, [0, 30, 31, 32, 40]), "collector": lambda repository: repository.collect(2)}
    threads = [threading.Thread(target=run, args=each) for each in acts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start.failed = failed
    return start


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_no_pack_of_a_checkpoint_is_ever_deleted(first_seed):
    for seed in range(first_seed, first_seed + 50):
        repository = run_both(seed, checkpoint)
        assert repository.failed == []
        assert repository.verify() == []
        assert len(repository.read().rows) == 5
        assert marks(repository.store) == []


def test_the_test_would_find_a_missing_lease():
    """The canary: without the lease, some order of steps deletes a pack that a checkpoint uses or is about to use."""
    assert any(repository.failed or repository.verify() for repository in (run_both(seed, checkpoint_unsafely) for seed in range(100)))


class Paged(MemoryStore):
    """A store that lists in two pages, and calls `between` once between them."""

    between = None

    def sizes(self):
        first = super().sizes()
        between, self.between = self.between, None
        if between:
            between()
        return {name: size for name, size in first.items() if name < "f"} | {n: s for n, s in super().sizes().items() if n >= "f"}


def test_a_writer_that_finishes_between_two_pages_of_a_listing_loses_nothing():
    """The first page lacks its manifest, and the second its lease, which is removed by then."""
    repository, ending = opened(Paged()), ExitStack()
    lease = ending.enter_context(repository.lease())
    infos = pack(repository.store, [0, 1]), pack(repository.store, [10])

    def end():
        for info in infos:  # the second name is in LATEST, the first is nowhere else
            repository.publish(manifest([info]), lease=lease)
        ending.close()

    repository.store.between = end
    assert repository.collect(None) == CollectionResult()
    assert repository.verify() == []
    assert len(repository.names()) == 2


def test_a_writer_that_finishes_while_listings_lag_loses_nothing():
    """The first listing is up to date and shows no lease. The second was made before the manifest was written."""

    class Stale(MemoryStore):
        listings = ()

        def sizes(self):
            return self.listings.pop(0)() if self.listings else super().sizes()

    repository, ending = opened(Stale()), ExitStack()
    lease = ending.enter_context(repository.lease())
    info = pack(repository.store, [0, 1])
    old = {}

    def end():
        old.update(MemoryStore.sizes(repository.store))
        repository.publish(manifest([info]), lease=lease)
        ending.close()
        return MemoryStore.sizes(repository.store)

    repository.store.listings = [end, lambda: old]
    assert repository.collect(None).skipped == "the listing of the store is not up to date"
    assert repository.verify() == []


def test_a_writer_whose_lease_has_expired_publishes_nothing():
    repository = opened()
    pack(repository.store, [0, 1])
    with pytest.raises(TieredKVError, match="expired before it was renewed"), repository.lease() as lease:
        repository.now_s.sleep(TTL_S + SKEW_S)
        assert repository.collect(None).packs_deleted == 1
        checkpoint_unsafely(repository, [0, 1], lease=lease)
    assert repository.names() == []


def test_packs_are_confirmed_again_if_the_lease_expires_while_the_manifest_is_written():
    repository = opened(Watched())
    deleted = []

    def slow(operation, names):
        if operation == "put" and names[0].endswith(".tkv"):
            repository.now_s.sleep(TTL_S)
            deleted.extend(name for name in repository.store.objects if name.endswith(".pack"))
            for name in deleted:
                del repository.store.objects[name]

    repository.store.before = slow
    error = refusal(checkpoint, repository, [0])
    assert error.kind is Kind.STORAGE
    assert deleted[0] in str(error)
    assert "LATEST" not in repository.store.objects
