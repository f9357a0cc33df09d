use super::super::keys::mix;
use super::*;

fn claimant(name: u128) -> Claimant<'static> {
    Claimant { pipeline: "shop", writer: Uuid::from_u128(name), now_ms: 5 }
}

fn first(floor: u64) -> Manifest {
    next_claim(None, floor, Uuid::from_u128(9), &claimant(1))
}

fn file(path: &str) -> StateFile {
    StateFile {
        path: path.to_owned(),
        node: "n".to_owned(),
        kind: "rows".to_owned(),
        epoch: 1,
        generation: 1,
        rows: 1,
        bytes: 1,
        min_time: None,
        max_time: Some(-1),
    }
}

#[test]
fn json_round_trip_and_versions() {
    let mut manifest = first(4);
    let progress = PartitionProgress { topic: 1, partition: 2, next_offset: 3, watermark: Some(i64::MIN) };
    let source = SourceProgress { partitions: vec![progress], ..Default::default() };
    manifest.sources.insert("transactions".to_owned(), source);
    manifest
        .nodes
        .insert("over".to_owned(), NodeProgress { watermark: Some(i64::MAX), ..Default::default() });
    manifest.files.push(file("state/n/rows-g1-e1-s0.parquet"));
    manifest.commits.push(PreparedCommit {
        sink: "training".to_owned(),
        location: "file:///lake".to_owned(),
        epoch: 3,
        files: vec![PreparedFile {
            path: "p".to_owned(),
            size: 1,
            rows: 2,
            add: serde_json::json!({"path": "p"}),
        }],
        sources: BTreeMap::new(),
        complete_until: Some(7),
        replaced_by: None,
    });
    let json = manifest.to_json().unwrap();
    assert_eq!(Manifest::from_json("m", &json).unwrap(), manifest);
    assert_eq!(manifest.sources["transactions"].positions(0).get(Place::new(0, 1, 2)), Some(3));

    let mut newer: Value = serde_json::from_slice(&json).unwrap();
    newer["format_version"] = 2.into();
    let error = Manifest::from_json("m", newer.to_string().as_bytes()).unwrap_err();
    assert!(error.message().contains("format version 2") && error.hint_text().is_some(), "{error}");
    for length in 0..json.len() {
        assert!(Manifest::from_json("m", &json[..length]).is_err());
    }
}

/// A manifest as an earlier build wrote it, with the mandatory fields only, stays readable.
#[test]
fn smallest_manifest_is_readable() {
    let json =
        br#"{"format_version":1,"epoch":3,"generation":2,"writer":"00000000-0000-0000-0000-000000000001",
        "state_id":"00000000-0000-0000-0000-000000000009","kind":"data","pipeline":"shop","parallelism":2,
        "created_at_ms":5}"#;
    let manifest = Manifest::from_json("m", json).unwrap();
    assert_eq!((manifest.epoch, manifest.kind, manifest.writer), (3, Kind::Data, Uuid::from_u128(1)));
}

#[test]
fn names() {
    let path = file_name("over 1/ü", "newest", 12, 345, 6);
    assert_eq!(path, "state/over=201=2F=C3=BC/newest-g12-e345-s6.parquet");
    assert_eq!(generation_of(&path), Some(12));
    assert_eq!(generation_of(&file_name("a-g9-e9", "b-e1", 1, 2, 3)), Some(1));
    assert_eq!(generation_of(&ledger_name("transactions", 7, 8)), Some(7));
    assert_eq!(generation_of(&dead_letter_name("..", 7, 8)), Some(7));
    assert!(!dead_letter_name("..", 7, 8).contains("/../"));
    for other in [
        "state/x.parquet",
        "state/n/rows-g1-e1-s0.txt",
        "other/n/rows-g1-e1-s0.parquet",
        "rows-g1-e1.parquet",
        &replayed_name(Uuid::from_u128(u128::MAX / 15 * 14)),
        &replayed_name(Uuid::from_u128(7)),
    ] {
        assert_eq!(generation_of(other), None, "{other}");
    }
    assert_eq!(manifest_path(42), "manifest/00000000000000000042");
    assert_eq!(manifest_epoch("00000000000000000042"), Some(42));
    assert_eq!(manifest_epoch("42"), None);
    assert_eq!(manifest_epoch("+0000000000000000042"), None);
}

#[test]
fn claims_continue_the_chain_or_begin_above_the_floor() {
    assert_eq!((first(0).epoch, first(0).generation), (1, 1));
    let mut last = first(17);
    assert_eq!((last.epoch, last.generation, last.data_epoch), (17, 17, None));
    last = last.next_data(6);
    last.garbage.push("state/n/rows-g1-e1-s0.parquet".to_owned());
    let claim = next_claim(Some(&last), 900, Uuid::from_u128(77), &claimant(2));
    assert_eq!((claim.epoch, claim.generation, claim.kind), (19, 18, Kind::Claim));
    assert_eq!((claim.state_id, claim.data_epoch, &claim.garbage), (last.state_id, Some(18), &last.garbage));
    assert_eq!(resolve_exists(&claim, &claim.clone()), Exists::Retried);
    assert_eq!(resolve_exists(&claim, &last), Exists::Other);
    assert_eq!(after_create(19, [18, 19]), Fence::Mine);
    assert_eq!(after_create(19, [19, 21, 20]), Fence::Fenced { by: 21 });
}

#[test]
fn garbage_names_what_only_the_past_needs() {
    let mut previous = first(1).next_data(0);
    previous.files = vec![file("state/n/a-g1-e2-s0.parquet"), file("state/n/b-g1-e2-s0.parquet")];
    previous.garbage =
        vec!["state/n/old-g1-e1-s0.parquet".to_owned(), "state/n/gone-g1-e1-s0.parquet".to_owned()];
    let mut next = previous.next_data(0);
    next.files = vec![file("state/n/b-g1-e2-s0.parquet"), file("state/n/c-g1-e3-s0.parquet")];
    let deleted = BTreeSet::from(["state/n/gone-g1-e1-s0.parquet".to_owned()]);
    let orphans = ["state/n/b-g1-e2-s0.parquet".to_owned(), "state/n/z-g0-e1-s0.parquet".to_owned()];
    let expected =
        ["state/n/a-g1-e2-s0.parquet", "state/n/old-g1-e1-s0.parquet", "state/n/z-g0-e1-s0.parquet"];
    assert_eq!(garbage_of(&previous, &next, &deleted, &orphans), expected);
}

#[test]
fn manifests_are_pruned_once_each_and_never_those_needed() {
    let mut manifest = first(3);
    let mut pruned = Vec::new();
    for step in 0..200u64 {
        let claims = mix(step).is_multiple_of(3);
        let next = if claims {
            let next = next_claim(Some(&manifest), 0, Uuid::nil(), &claimant(2));
            let all = (3..next.epoch).map(manifest_path).filter(|path| !pruned.contains(path));
            pruned.extend(orphans_of(&next, all));
            next
        } else {
            let next = manifest.next_data(0);
            pruned.extend(garbage_of(&manifest, &next, &BTreeSet::new(), &[]));
            next
        };
        assert!(next.oldest_kept() >= manifest.oldest_kept());
        for needed in [next.data_epoch, next.previous_data_epoch, Some(next.epoch)].into_iter().flatten() {
            assert!(!pruned.contains(&manifest_path(needed)), "epoch {needed} at {}", next.epoch);
        }
        manifest = next;
    }
    pruned.sort();
    // Below the first epoch nothing exists, so naming it is harmless.
    pruned.retain(|path| *path >= manifest_path(3));
    assert_eq!(pruned, (3..manifest.oldest_kept()).map(manifest_path).collect::<Vec<_>>());
    assert!(manifest.epoch - manifest.oldest_kept() < 20);
}

#[test]
fn orphans_are_older_and_unknown() {
    let mut claim = first(5);
    claim.files = vec![file("state/n/live-g3-e4-s0.parquet")];
    claim.garbage = vec!["state/n/listed-g3-e4-s0.parquet".to_owned()];
    let listed = [
        "state/n/live-g3-e4-s0.parquet",
        "state/n/listed-g3-e4-s0.parquet",
        "state/n/lost-g4-e9-s0.parquet",
        "ledger/s/late-g2-e2.parquet",
        "state/n/mine-g5-e9-s0.parquet",
        "state/n/newer-g6-e9-s0.parquet",
        "state/n/notes.txt",
        "manifest/00000000000000000005",
    ];
    let orphans = orphans_of(&claim, listed.map(str::to_owned));
    assert_eq!(orphans, ["ledger/s/late-g2-e2.parquet", "state/n/lost-g4-e9-s0.parquet"]);
}

// A model of the world: the chain, one exactly-once sink, and processes that may die or sleep at every step.

#[derive(Clone, Default)]
struct World {
    chain: BTreeMap<u64, Manifest>,
    /// Transaction version of the sink, and what it committed.
    version: u64,
    committed: Vec<(u64, u64)>,
    /// Writers so far: each start of a process draws a new one.
    writers: u128,
}

#[derive(Clone)]
enum Step {
    Read,
    Create(Box<Manifest>),
    List,
    Commit,
    /// Saw the fence.
    Stopped,
}

#[derive(Clone)]
struct Process {
    writer: u128,
    step: Step,
    /// The newest manifest that it published itself.
    owned: Option<Manifest>,
    /// Its last listing, made when the chain ended there, said that it owns the pipeline.
    owner_as_of: Option<u64>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Fine,
    /// The process dies and starts again.
    Crash,
    /// The request arrives, its answer does not, and the process tries again.
    Lost,
}

/// What a data manifest adds: one to the offset. A lost or doubled epoch shows as a wrong sum.
fn offset(manifest: &Manifest) -> u64 {
    manifest.sources.get("s").map_or(0, |s| s.accounts.read)
}

fn with_next_offset(mut manifest: Manifest) -> Manifest {
    let epoch = manifest.epoch;
    manifest.sources.entry("s".to_owned()).or_default().accounts.read += 1;
    manifest.commits = vec![PreparedCommit {
        sink: "t".to_owned(),
        location: String::new(),
        epoch,
        files: Vec::new(),
        sources: BTreeMap::new(),
        complete_until: Some(offset(&manifest) as i64),
        replaced_by: None,
    }];
    manifest
}

impl World {
    fn start(&mut self) -> Process {
        self.writers += 1;
        Process { writer: self.writers, step: Step::Read, owned: None, owner_as_of: None }
    }

    fn step(&mut self, process: &mut Process, fate: Fate) {
        if fate == Fate::Crash {
            *process = self.start();
            return;
        }
        process.step = match std::mem::replace(&mut process.step, Step::Stopped) {
            Step::Read => {
                let last = self.chain.values().next_back();
                let claim = next_claim(last, 1, Uuid::from_u128(9), &claimant(process.writer));
                Step::Create(Box::new(claim))
            }
            Step::Create(manifest) => self.create(process, manifest, fate),
            Step::List => self.list(process),
            Step::Commit => self.commit(process, fate),
            Step::Stopped => Step::Stopped,
        };
    }

    fn create(&mut self, process: &mut Process, manifest: Box<Manifest>, fate: Fate) -> Step {
        let Some(found) = self.chain.get(&manifest.epoch) else {
            self.chain.insert(manifest.epoch, (*manifest).clone());
            if fate == Fate::Lost {
                return Step::Create(manifest);
            }
            process.owned = Some(*manifest);
            return Step::List;
        };
        match (resolve_exists(&manifest, found), manifest.kind) {
            (Exists::Retried, _) => {
                process.owned = Some(*manifest);
                Step::List
            }
            (Exists::Other, Kind::Claim) => Step::Read,
            (Exists::Other, Kind::Data) => Step::Stopped,
        }
    }

    fn list(&self, process: &mut Process) -> Step {
        let mine = process.owned.as_ref().unwrap().epoch;
        let newest = *self.chain.keys().next_back().unwrap();
        match after_create(mine, self.chain.keys().copied()) {
            Fence::Fenced { by } => {
                assert_eq!(by, newest);
                Step::Stopped
            }
            Fence::Mine => {
                assert_eq!(newest, mine, "a fenced owner believes that it owns");
                assert_eq!(self.chain[&newest].writer.as_u128(), process.writer, "the chain is not its own");
                process.owner_as_of = Some(newest);
                Step::Commit
            }
        }
    }

    /// Replays the prepared commits, acknowledged one way or the other, then prepares the next manifest.
    fn commit(&mut self, process: &Process, fate: Fate) -> Step {
        let owned = process.owned.as_ref().unwrap();
        for commit in &owned.commits {
            if commit.epoch > self.version {
                self.version = commit.epoch;
                self.committed.push((commit.epoch, commit.complete_until.unwrap() as u64));
            }
        }
        if fate == Fate::Lost {
            return Step::Commit;
        }
        Step::Create(Box::new(with_next_offset(owned.next_data(0))))
    }

    fn check(&self, processes: &[Process]) {
        let mut previous: Option<&Manifest> = None;
        for (epoch, manifest) in &self.chain {
            assert_eq!(*epoch, manifest.epoch);
            if let Some(previous) = previous {
                assert_eq!(*epoch, previous.epoch + 1, "a hole in the chain");
                let claims = u64::from(manifest.kind == Kind::Claim);
                assert_eq!(manifest.generation, previous.generation + claims);
                assert_eq!(
                    offset(manifest),
                    offset(previous) + 1 - claims,
                    "epoch {epoch} does not continue"
                );
                assert!(
                    claims == 1 || manifest.writer == previous.writer,
                    "data by a process that did not claim"
                );
            }
            previous = Some(manifest);
        }
        // The sink holds a prefix of the data epochs, each once, with exactly their content.
        let data = self.chain.values().filter(|m| m.kind == Kind::Data);
        let expected: Vec<(u64, u64)> = data.map(|m| (m.epoch, offset(m))).collect();
        assert!(expected.starts_with(&self.committed), "{:?} is no prefix of {expected:?}", self.committed);
        assert!(
            self.committed.len() + 1 >= expected.len(),
            "published before its predecessor was acknowledged"
        );
        let newest = self.chain.keys().next_back().copied();
        let owners = processes.iter().filter(|p| p.owner_as_of.is_some() && p.owner_as_of == newest);
        assert!(owners.count() <= 1, "two processes own the newest manifest");
    }
}

/// Every interleaving of two processes to a depth, with a crash or a lost answer at each point.
#[test]
fn two_writers_in_every_order() {
    fn explore(world: &World, processes: &[Process; 2], depth: usize, faults: usize, visited: &mut usize) {
        *visited += 1;
        world.check(processes);
        if depth == 0 {
            return;
        }
        for turn in 0..2 {
            for fate in [Fate::Fine, Fate::Crash, Fate::Lost] {
                let fault = usize::from(fate != Fate::Fine);
                if fault > faults || matches!(processes[turn].step, Step::Stopped) && fate != Fate::Crash {
                    continue;
                }
                let (mut world, mut processes) = (world.clone(), processes.clone());
                world.step(&mut processes[turn], fate);
                explore(&world, &processes, depth - 1, faults - fault, visited);
            }
        }
    }
    let mut world = World::default();
    let processes = [world.start(), world.start()];
    let mut visited = 0;
    explore(&world, &processes, 10, 1, &mut visited);
    assert!(visited > 10_000, "{visited}");
}

/// Long random runs of three processes, zombies included: one that is not scheduled for long is one.
#[test]
fn three_writers_at_random() {
    let mut longest = 0;
    for seed in 0..300u64 {
        let mut world = World::default();
        let mut processes = vec![world.start(), world.start(), world.start()];
        for step in 0..200u64 {
            let draw = mix(seed << 32 | step);
            let turn = (draw % 3) as usize;
            let fate = match draw >> 8 & 0xFF {
                0..8 => Fate::Crash,
                8..40 => Fate::Lost,
                _ => Fate::Fine,
            };
            world.step(&mut processes[turn], fate);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.check(&processes)));
            assert!(outcome.is_ok(), "seed {seed}, step {step}");
        }
        longest = longest.max(world.committed.len());
    }
    assert!(longest > 10, "no run got anywhere: {longest}");
}

/// A damaged manifest is an error, or one that the rest of the program can go on from.
#[test]
fn no_bytes_make_the_reader_panic() {
    let mut manifest = first(4).next_data(1).next_data(2);
    let partitions =
        vec![PartitionProgress { topic: 1, partition: 2, next_offset: 3, watermark: Some(i64::MIN) }];
    manifest.sources.insert("t".to_owned(), SourceProgress { partitions, ..Default::default() });
    manifest.files.push(file("state/n/rows-g1-e1-s0.parquet"));
    manifest.garbage.push("ledger/t/late-g1-e1.parquet".to_owned());
    let json = manifest.to_json().unwrap();
    let mut dice = crate::stream::dice::Dice(3);
    let mut read = 0;
    for round in 0..20_000 {
        let mut bytes = dice.mutate(&json);
        if round % 3 == 0 {
            // Other numbers in the right places.
            let mut value: Value = serde_json::from_slice(&json).unwrap();
            let names =
                ["epoch", "generation", "data_epoch", "previous_data_epoch", "parallelism", "created_at_ms"];
            let name = names[dice.roll(names.len() as u64) as usize];
            value[name] = [0, 1, u64::MAX, u64::MAX - 1, i64::MAX as u64][dice.roll(5) as usize].into();
            bytes = serde_json::to_vec(&value).unwrap();
        }
        let Ok(found) = Manifest::from_json("m", &bytes) else { continue };
        read += 1;
        let next = found.next_data(1);
        let claim = next_claim(Some(&found), 1, Uuid::nil(), &claimant(2));
        assert_eq!((next.epoch, claim.epoch), (found.epoch + 1, found.epoch + 1));
        let listed = found.referenced().into_iter().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(orphans_of(&claim, listed), Vec::<String>::new());
        found.sources.values().for_each(|source| drop(source.positions(0)));
        assert!(found.oldest_kept() <= next.oldest_kept());
        next.to_json().unwrap();
    }
    assert!(read > 1_000, "{read}");
}
