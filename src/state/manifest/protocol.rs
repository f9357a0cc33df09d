//! The whole protocol as a model: owner, claimants and zombies take its steps in any order, may die after each, and may
//! lose an answer. The decisions are the real ones ([`next_claim`], [`garbage_of`], …); the I/O is a few maps.
//!
//! What must hold after every step, whatever came before: the epochs that each sink shows are a prefix of those that were
//! published, each once; and every file that a replay may still need is there.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::super::keys::mix;
use super::*;

/// What the outside world holds.
#[derive(Clone, Default, Debug)]
struct World {
    /// Manifests that exist.
    chain: BTreeMap<u64, Manifest>,
    /// All that ever extended the chain.
    history: BTreeMap<u64, Manifest>,
    files: BTreeSet<String>,
    /// A Delta table: (epoch, offset) of its commits.
    table: Vec<(u64, u64)>,
    /// A folder of files: staged ones and those that readers see, by name.
    staged: BTreeSet<String>,
    visible: BTreeMap<String, u64>,
    writers: u128,
}

/// What a process does next.
#[derive(Clone, Debug)]
enum Step {
    Read,
    Create(Box<Manifest>),
    /// The listing after a creation.
    Fence,
    Orphans,
    Table,
    /// On S3 a move is a copy and a deletion.
    Copy,
    Unstage,
    /// A claimant removes what older generations staged.
    CleanStaged,
    /// The listing before a clean-up.
    FenceAgain,
    Delete(Vec<String>),
    Write,
    Stage,
    Stopped,
}

#[derive(Clone, Debug)]
struct Process {
    writer: u128,
    step: Step,
    owned: Option<Manifest>,
    deleted: BTreeSet<String>,
    orphans: Vec<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Fine,
    Crash,
    /// The step is done, its answer is lost, and it is done again.
    Lost,
}

fn claimant(name: u128) -> Claimant<'static> {
    Claimant { pipeline: "shop", writer: Uuid::from_u128(name), now_ms: 0 }
}

fn offset(manifest: &Manifest) -> u64 {
    manifest.sources.get("s").map_or(0, |source| source.accounts.read)
}

fn own_file(manifest: &Manifest) -> String {
    file_name("n", "rows", manifest.generation, manifest.epoch, 0)
}

fn staged_file(manifest: &Manifest) -> String {
    format!("part-g{}-e{}", manifest.generation, manifest.epoch)
}

/// The next data manifest as a coordinator fills it: one more row read, one more file, the third-newest let go.
fn filled(process: &Process) -> Manifest {
    let last = process.owned.as_ref().unwrap();
    let mut next = last.next_data(0);
    next.sources.entry("s".to_owned()).or_default().accounts.read += 1;
    let (path, epoch, generation) = (own_file(&next), next.epoch, next.generation);
    next.files.push(StateFile {
        path,
        node: "n".to_owned(),
        kind: "rows".to_owned(),
        epoch,
        generation,
        rows: 1,
        bytes: 1,
        min_time: None,
        max_time: None,
    });
    if next.files.len() > 2 {
        next.files.remove(0);
    }
    let commit = |sink: &str, path: String| PreparedCommit {
        sink: sink.to_owned(),
        location: String::new(),
        epoch,
        files: vec![PreparedFile { path, size: 0, rows: 0, add: Value::Null }],
        sources: BTreeMap::new(),
        complete_until: Some(offset(&next) as i64),
        replaced_by: None,
    };
    next.commits = vec![commit("table", String::new()), commit("folder", staged_file(&next))];
    next.garbage = garbage_of(last, &next, &process.deleted, &process.orphans);
    next
}

fn commit_of(process: &Process, sink: &str) -> Option<PreparedCommit> {
    process.owned.as_ref()?.commits.iter().find(|commit| commit.sink == sink).cloned()
}

impl World {
    fn start(&mut self) -> Process {
        self.writers += 1;
        let (writer, step) = (self.writers, Step::Read);
        Process { writer, step, owned: None, deleted: BTreeSet::new(), orphans: Vec::new() }
    }

    fn step(&mut self, process: &mut Process, fate: Fate) {
        if fate == Fate::Crash {
            *process = self.start();
            return;
        }
        let step = process.step.clone();
        let next = self.act(process, &step);
        process.step = if fate == Fate::Lost { step } else { next };
    }

    fn act(&mut self, process: &mut Process, step: &Step) -> Step {
        match step {
            Step::Read => {
                let last = self.chain.values().next_back();
                Step::Create(Box::new(next_claim(last, 1, Uuid::from_u128(9), &claimant(process.writer))))
            }
            Step::Create(manifest) => self.create(process, manifest),
            Step::Fence => match self.fenced(process) {
                true => Step::Stopped,
                false if process.owned.as_ref().is_some_and(|m| m.kind == Kind::Claim) => Step::Orphans,
                false => Step::Table,
            },
            Step::Orphans => {
                let claim = process.owned.as_ref().unwrap();
                let manifests = self.chain.keys().map(|epoch| manifest_path(*epoch));
                process.orphans = orphans_of(claim, self.files.iter().cloned().chain(manifests));
                Step::Table
            }
            Step::Table => {
                if let Some(commit) = commit_of(process, "table")
                    && self.table.last().is_none_or(|(epoch, _)| *epoch < commit.epoch)
                {
                    self.table.push((commit.epoch, commit.complete_until.unwrap() as u64));
                }
                Step::Copy
            }
            Step::Copy | Step::Unstage => self.publish(process, step),
            Step::CleanStaged => {
                let mine = process.owned.as_ref().unwrap().generation;
                let of = |name: &String| name[6..].split('-').next().unwrap().parse::<u64>().unwrap();
                self.staged.retain(|name| of(name) >= mine);
                Step::Write
            }
            Step::FenceAgain if self.fenced(process) => Step::Stopped,
            Step::FenceAgain => Step::Delete(process.owned.as_ref().unwrap().garbage.clone()),
            Step::Delete(left) => self.delete(process, left),
            Step::Write => {
                self.files.insert(own_file(&process.owned.as_ref().unwrap().next_data(0)));
                Step::Stage
            }
            Step::Stage => {
                let next = filled(process);
                self.staged.insert(staged_file(&next));
                Step::Create(Box::new(next))
            }
            Step::Stopped => Step::Stopped,
        }
    }

    /// The folder's part of a commit.
    fn publish(&mut self, process: &Process, step: &Step) -> Step {
        let commit = commit_of(process, "folder");
        if matches!(step, Step::Copy) {
            if let Some(commit) = commit
                && self.staged.contains(&commit.files[0].path)
            {
                let content = commit.complete_until.unwrap() as u64;
                self.visible.insert(commit.files[0].path.clone(), content);
            }
            return Step::Unstage;
        }
        if let Some(commit) = commit {
            self.staged.remove(&commit.files[0].path);
        }
        match process.owned.as_ref().unwrap().kind {
            Kind::Claim => Step::CleanStaged,
            Kind::Data => Step::FenceAgain,
        }
    }

    fn create(&mut self, process: &mut Process, manifest: &Manifest) -> Step {
        let Some(found) = self.chain.get(&manifest.epoch) else {
            self.chain.insert(manifest.epoch, manifest.clone());
            // Where an epoch was pruned a zombie can create it again; the listing stops it then.
            if self.history.keys().next_back().is_none_or(|newest| manifest.epoch == newest + 1) {
                self.history.insert(manifest.epoch, manifest.clone());
            }
            return Self::created(process, manifest);
        };
        match (resolve_exists(manifest, found), manifest.kind) {
            (Exists::Retried, _) => Self::created(process, manifest),
            (Exists::Other, Kind::Claim) => Step::Read,
            (Exists::Other, Kind::Data) => Step::Stopped,
        }
    }

    fn created(process: &mut Process, manifest: &Manifest) -> Step {
        process.owned = Some(manifest.clone());
        if manifest.kind == Kind::Data {
            process.orphans.clear();
        }
        Step::Fence
    }

    fn fenced(&self, process: &Process) -> bool {
        let mine = process.owned.as_ref().unwrap().epoch;
        after_create(mine, self.chain.keys().copied()) != Fence::Mine
    }

    /// One file of a garbage list.
    fn delete(&mut self, process: &mut Process, left: &[String]) -> Step {
        let Some((path, rest)) = left.split_first() else {
            process.deleted = process.owned.as_ref().unwrap().garbage.iter().cloned().collect();
            return Step::Write;
        };
        match path.strip_prefix("manifest/").and_then(manifest_epoch) {
            Some(epoch) => drop(self.chain.remove(&epoch)),
            None => drop(self.files.remove(path)),
        }
        Step::Delete(rest.to_vec())
    }

    fn check(&self) {
        let Some(newest) = self.history.values().next_back() else { return };
        assert!(self.chain.contains_key(&newest.epoch), "the newest manifest was deleted");
        let data: Vec<&Manifest> = self.history.values().filter(|m| m.kind == Kind::Data).collect();
        let expected: Vec<(u64, u64)> = data.iter().map(|m| (m.epoch, offset(m))).collect();
        let rising = expected.iter().zip(1..).all(|((_, offset), at)| *offset == at);
        assert!(rising, "offsets are lost or doubled: {expected:?}");
        assert!(expected.starts_with(&self.table), "{:?} is no prefix of {expected:?}", self.table);
        assert!(self.table.len() + 1 >= expected.len(), "published before its predecessor was committed");
        let mut shown: Vec<(u64, u64)> = Vec::new();
        for manifest in &data {
            shown.extend(self.visible.get(&staged_file(manifest)).map(|content| (manifest.epoch, *content)));
        }
        assert_eq!(shown.len(), self.visible.len(), "a file of an epoch that was never published is visible");
        assert!(expected.starts_with(&shown), "{shown:?} is no prefix of {expected:?}");
        assert!(shown.len() + 1 >= expected.len(), "published before its predecessor was visible");
        let missing = |manifest: &Manifest| {
            manifest.referenced().into_iter().find(|path| !self.files.contains(*path)).map(str::to_owned)
        };
        assert_eq!(missing(newest), None, "a file that the newest manifest names was deleted");
        let Some(last) = data.last() else { return };
        if shown.len() < expected.len() {
            assert!(self.staged.contains(&staged_file(last)), "a staged file of the newest epoch is gone");
        }
        // From the data manifest before, the prepared commits can be made again.
        if let Some(before) = data.len().checked_sub(2).map(|at| data[at])
            && (self.table.len() < expected.len() || shown.len() < expected.len())
        {
            assert_eq!(missing(before), None, "a file that a replay needs was deleted");
        }
    }
}

fn digest(world: &World, processes: &[Process]) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut manifest = |of: &Manifest| {
        // Everything else follows from these.
        let names: Vec<&String> = of.files.iter().map(|file| &file.path).collect();
        (of.epoch, of.generation, of.writer, offset(of), names, &of.garbage).hash(&mut hasher);
    };
    world.chain.values().chain(world.history.values()).for_each(&mut manifest);
    for process in processes {
        process.owned.iter().for_each(&mut manifest);
        if let Step::Create(next) = &process.step {
            manifest(next);
        }
    }
    (&world.files, &world.table, &world.staged, &world.visible, world.writers).hash(&mut hasher);
    for Process { writer, step, deleted, orphans, .. } in processes {
        (writer, std::mem::discriminant(step), deleted, orphans).hash(&mut hasher);
        if let Step::Delete(left) = step {
            left.hash(&mut hasher);
        }
    }
    hasher.finish()
}

/// Every interleaving of two processes, up to a number of epochs, with a death or a lost answer at any one point.
#[test]
fn every_order_of_two_processes() {
    const EPOCHS: u64 = 4;
    let mut first = World::default();
    let processes = [first.start(), first.start()];
    let mut todo = vec![(first, processes, 1)];
    let mut visited = HashSet::new();
    while let Some((world, processes, faults)) = todo.pop() {
        for turn in 0..2 {
            for fate in [Fate::Fine, Fate::Crash, Fate::Lost] {
                let fault = usize::from(fate != Fate::Fine);
                if fault > faults || matches!(processes[turn].step, Step::Stopped) && fate != Fate::Crash {
                    continue;
                }
                let (mut world, mut processes) = (world.clone(), processes.clone());
                world.step(&mut processes[turn], fate);
                world.check();
                let within = world.history.keys().next_back().is_none_or(|epoch| *epoch <= EPOCHS);
                if within && visited.insert((digest(&world, &processes), faults - fault)) {
                    todo.push((world, processes, faults - fault));
                }
            }
        }
    }
    assert!(visited.len() > 10_000, "{}", visited.len());
}

/// Long random runs of three processes: many epochs, pruned manifests, zombies that sleep through them.
#[test]
fn three_processes_at_random() {
    let (mut longest, mut pruned) = (0, 0);
    for seed in 0..400u64 {
        let mut world = World::default();
        let mut processes = [world.start(), world.start(), world.start()];
        let mut turn = 0;
        for step in 0..600u64 {
            let draw = mix(seed << 32 | step);
            // A process runs for a while, the others sleep.
            if draw.is_multiple_of(29) {
                turn = (draw >> 16) as usize % 3;
            }
            let fate = match draw >> 8 & 0xFF {
                0..3 => Fate::Crash,
                3..20 => Fate::Lost,
                _ => Fate::Fine,
            };
            if matches!(processes[turn].step, Step::Stopped) {
                world.step(&mut processes[turn], Fate::Crash);
            }
            world.step(&mut processes[turn], fate);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.check()));
            assert!(outcome.is_ok(), "seed {seed}, step {step}");
        }
        longest = longest.max(world.table.len());
        pruned += world.history.len() - world.chain.len();
    }
    assert!(longest > 15 && pruned > 100, "no run got anywhere: {longest} {pruned}");
}
