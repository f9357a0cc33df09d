//! What a schedule does next: pure functions of its newest entry and a time. The I/O around them is in [`super::run`].
//!
//! An [`Entry`] holds all that is to be known of a schedule. Its life:
//!
//! ```text
//! nothing ──begin──▶ idle ──fire is due──▶ running ──succeeded, or failed for good──▶ idle
//!                     ▲ │ skip               │ ▲ failed, stopped, lost       │ its time has come
//!                     └─┘                    └─┴──────────▶ waiting ─────────┘
//! ```
//!
//! A run that was stopped, or whose process died, is begun again at once and does not count as a failure. After a
//! failure it is tried again `retries` times, after `retry_delay`, twice that, and so on, at most an hour. A backfill that
//! failed for good, or that could not yet reach the end of its interval, is made up for: the next one begins where that
//! one should have ([`Entry::carry`]). Intervals of an INSERT are never merged, as each may have been written.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sql::{CatchUp, CreateSchedule, ScheduleAction};
use crate::stream::Micros;

pub const FORMAT: u32 = 1;
/// A fire older than this was missed.
const IN_TIME: Micros = 60_000_000;
const LONGEST_DELAY: Micros = 3_600_000_000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub format: u32,
    /// Random: no two entries are the same.
    pub id: String,
    /// The process.
    pub writer: String,
    pub schedule: String,
    pub at: Micros,
    /// Fires up to here are settled: run, skipped, or from before the schedule was known.
    pub settled: Micros,
    /// The next backfill begins here at the latest.
    pub carry: Option<Micros>,
    pub now: Now,
    /// The attempt that this entry begins or ends.
    pub run: Option<Run>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Now {
    Idle,
    /// The writer runs it, as long as it says so within each `lease_ms`.
    Running {
        task: Task,
        lease_ms: u64,
    },
    Waiting {
        task: Task,
        not_before: Micros,
    },
}

/// A fire that is not settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub fire: Micros,
    pub from: Micros,
    pub to: Micros,
    /// Counts all of them, from 1.
    pub attempt: u32,
    /// Attempts that failed.
    pub failures: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Running,
    Succeeded,
    Failed,
    /// The process was told to stop.
    Stopped,
    /// The process died, or could not reach the state in time.
    Lost,
    /// Fires that were missed.
    Skipped,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
            Self::Lost => "lost",
            Self::Skipped => "skipped",
        }
    }
}

/// One attempt, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub fire: Micros,
    pub from: Micros,
    pub to: Micros,
    pub attempt: u32,
    pub state: State,
    pub rows: Option<u64>,
    pub started: Option<Micros>,
    pub ended: Option<Micros>,
    pub error: Option<String>,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// `reached`: before the end of the interval, as nothing behind it is complete yet.
    Succeeded {
        rows: u64,
        reached: Option<Micros>,
    },
    Failed(String),
    Stopped,
    Lost(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Append this, and look again.
    Note(Box<Entry>),
    /// Append this, and run its task.
    Start(Box<Entry>),
    /// Another process runs it.
    Watch { lease_ms: u64 },
    /// Look again at this time; `retry`: a run that failed waits for it.
    Sleep { until: Micros, retry: bool },
}

/// Who asks, when.
#[derive(Debug, Clone)]
pub struct Asker {
    pub writer: String,
    /// For the next entry.
    pub id: String,
    pub now: Micros,
    pub lease_ms: u64,
}

/// # Errors
/// User: times beyond those that there are.
pub fn next(schedule: &CreateSchedule, last: Option<&Entry>, asker: &Asker) -> Result<Step> {
    let Some(last) = last else {
        // A start is itself a moment at which it may fire.
        let settled = schedule.start.map_or(asker.now, |start| start - 1);
        let entry = Entry {
            format: FORMAT,
            id: asker.id.clone(),
            writer: asker.writer.clone(),
            schedule: schedule.name.clone(),
            at: asker.now,
            settled,
            carry: None,
            now: Now::Idle,
            run: None,
        };
        return Ok(Step::Note(Box::new(entry)));
    };
    match &last.now {
        // A process runs one attempt of a schedule at a time: this one's end was not recorded.
        Now::Running { .. } if last.writer == asker.writer => {
            let why = "its end could not be recorded".to_owned();
            Ok(Step::Note(Box::new(ended(schedule, last, Outcome::Lost(why), asker)?)))
        }
        Now::Running { lease_ms, .. } => Ok(Step::Watch { lease_ms: *lease_ms }),
        Now::Waiting { not_before, .. } if *not_before > asker.now => {
            Ok(Step::Sleep { until: *not_before, retry: true })
        }
        Now::Waiting { task, .. } => {
            let task = Task { attempt: task.attempt + 1, ..task.clone() };
            Ok(Step::Start(Box::new(started(last, task, asker))))
        }
        Now::Idle => due(schedule, last, asker),
    }
}

fn due(schedule: &CreateSchedule, last: &Entry, asker: &Asker) -> Result<Step> {
    let mut fires = schedule.calendar.fires_after(last.settled);
    let Some(first) = fires.next() else { return Err(beyond(schedule)) };
    if first > asker.now {
        return Ok(Step::Sleep { until: first, retry: false });
    }
    let later = fires.take_while(|fire| *fire <= asker.now);
    // The newest of those that are passed over, and their number.
    let skipped = match schedule.catch_up {
        CatchUp::All => None,
        CatchUp::Last => {
            later
                .fold((None, first), |(before, fire), next| {
                    (Some((fire, before.map_or(1, |(_, n)| n + 1))), next)
                })
                .0
        }
        CatchUp::None => std::iter::once(first)
            .chain(later)
            .take_while(|fire| asker.now - fire > IN_TIME)
            .fold(None, |before: Option<(Micros, u64)>, fire| Some((fire, before.map_or(1, |(_, n)| n + 1)))),
    };
    if let Some((newest, count)) = skipped {
        let (from, to) = (interval(schedule, first)?.0, interval(schedule, newest)?.1);
        let run = Run {
            fire: newest,
            from,
            to,
            attempt: 0,
            state: State::Skipped,
            rows: None,
            started: None,
            ended: Some(asker.now),
            error: Some(format!("{count} missed, catch_up = '{}'", schedule.catch_up.name())),
        };
        let entry = Entry { settled: newest, run: Some(run), ..following(last, asker) };
        return Ok(Step::Note(Box::new(entry)));
    }
    let (from, to) = interval(schedule, first)?;
    let from = last.carry.map_or(from, |carry| carry.min(from));
    let task = Task { fire: first, from, to, attempt: 1, failures: 0 };
    Ok(Step::Start(Box::new(started(last, task, asker))))
}

fn following(last: &Entry, asker: &Asker) -> Entry {
    Entry {
        id: asker.id.clone(),
        writer: asker.writer.clone(),
        at: asker.now,
        now: Now::Idle,
        run: None,
        ..last.clone()
    }
}

fn started(last: &Entry, task: Task, asker: &Asker) -> Entry {
    let run = Run {
        fire: task.fire,
        from: task.from,
        to: task.to,
        attempt: task.attempt,
        state: State::Running,
        rows: None,
        started: Some(asker.now),
        ended: None,
        error: None,
    };
    let now = Now::Running { task, lease_ms: asker.lease_ms };
    Entry { now, run: Some(run), ..following(last, asker) }
}

/// The entry behind the one that began an attempt.
///
/// # Errors
/// Internal: that entry began none.
pub fn ended(schedule: &CreateSchedule, claim: &Entry, outcome: Outcome, asker: &Asker) -> Result<Entry> {
    let (Now::Running { task, .. }, Some(run)) = (&claim.now, &claim.run) else {
        return Err(Error::internal(format!("no run of the schedule {} is to be ended", schedule.name)));
    };
    let mut run = Run { ended: Some(asker.now), ..run.clone() };
    let mut entry = following(claim, asker);
    let is_backfill = matches!(schedule.action, ScheduleAction::Backfill { .. });
    let again = |not_before: Micros, failures: u32| Now::Waiting {
        task: Task { failures, ..task.clone() },
        not_before,
    };
    match outcome {
        Outcome::Succeeded { rows, reached } => {
            (run.state, run.rows) = (State::Succeeded, Some(rows));
            entry.settled = task.fire;
            entry.carry = reached.filter(|_| is_backfill);
        }
        Outcome::Failed(why) => {
            (run.state, run.error) = (State::Failed, Some(why));
            let failures = task.failures + 1;
            if failures <= schedule.retries {
                entry.now = again(asker.now.saturating_add(delay(schedule, failures)), failures);
            } else {
                entry.settled = task.fire;
                entry.carry = Some(task.from).filter(|_| is_backfill);
            }
        }
        Outcome::Stopped => {
            run.state = State::Stopped;
            entry.now = again(asker.now, task.failures);
        }
        Outcome::Lost(why) => {
            (run.state, run.error) = (State::Lost, Some(why));
            entry.now = again(asker.now, task.failures);
        }
    }
    entry.run = Some(run);
    Ok(entry)
}

/// The pause behind the n-th failure.
fn delay(schedule: &CreateSchedule, failures: u32) -> Micros {
    let factor = 1_i64 << failures.saturating_sub(1).min(40);
    schedule.retry_delay_micros.saturating_mul(factor).min(LONGEST_DELAY.max(schedule.retry_delay_micros))
}

fn interval(schedule: &CreateSchedule, fire: Micros) -> Result<(Micros, Micros)> {
    schedule.interval(fire).ok_or_else(|| beyond(schedule))
}

fn beyond(schedule: &CreateSchedule) -> Error {
    Error::user(format!("schedule {}: its times are beyond those that there are", schedule.name))
        .hint("Shorten the interval, or give a later start.")
        .at(schedule.place.clone())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::sql::{SourceText, Statement, Variables, parser};
    use crate::stream::dice::Dice;

    const MINUTE: Micros = 60_000_000;
    const HOUR: Micros = 60 * MINUTE;
    const DAY: Micros = 24 * HOUR;

    fn schedule(options: &str) -> CreateSchedule {
        let text = format!(
            "CREATE SCHEDULE n CRON '0 * * * *' WITH ({options}) AS BACKFILL s FOR LAST INTERVAL '1 hour'"
        );
        let variables = Variables { overrides: BTreeMap::new(), environment: &|_| None };
        let parsed = parser::parse(&SourceText::new("x.sql", &text), &variables).unwrap();
        match parsed.into_iter().next() {
            Some(Statement::CreateSchedule(schedule)) => *schedule,
            other => panic!("{other:?}"),
        }
    }

    fn asker(writer: &str, now: Micros) -> Asker {
        Asker { writer: writer.to_owned(), id: format!("{writer}-{now}"), now, lease_ms: 30_000 }
    }

    fn noted(schedule: &CreateSchedule, last: Option<&Entry>, now: Micros) -> Entry {
        match next(schedule, last, &asker("a", now)).unwrap() {
            Step::Note(entry) => *entry,
            other => panic!("{other:?}"),
        }
    }

    fn begun(schedule: &CreateSchedule, last: &Entry, now: Micros) -> Entry {
        match next(schedule, Some(last), &asker("a", now)).unwrap() {
            Step::Start(entry) => *entry,
            other => panic!("{other:?}"),
        }
    }

    fn fire(entry: &Entry) -> (Micros, Micros, Micros, u32) {
        let run = entry.run.as_ref().unwrap();
        (run.fire / HOUR, run.from / HOUR, run.to / HOUR, run.attempt)
    }

    #[test]
    fn a_schedule_begins_when_it_is_first_seen_or_at_its_start() {
        let plain = schedule("catch_up = 'all'");
        let born = noted(&plain, None, 10 * HOUR + 1);
        assert_eq!(
            next(&plain, Some(&born), &asker("a", 10 * HOUR + 2)).unwrap(),
            Step::Sleep { until: 11 * HOUR, retry: false }
        );
        let early = schedule("start = '1970-01-01 03:00:00'");
        let born = noted(&early, None, 10 * HOUR + 1);
        assert_eq!(fire(&begun(&early, &born, 10 * HOUR + 1)), (3, 2, 3, 1));
    }

    #[test]
    fn missed_fires_are_caught_up_as_the_schedule_says() {
        let start = "start = '1970-01-01 03:00:00'";
        let late = 7 * HOUR + 30 * MINUTE;
        let all = schedule(start);
        let mut entry = noted(&all, None, late);
        let mut fires = Vec::new();
        while let Step::Start(claim) = next(&all, Some(&entry), &asker("a", late)).unwrap() {
            fires.push(fire(&claim).0);
            let outcome = Outcome::Succeeded { rows: 1, reached: None };
            entry = ended(&all, &claim, outcome, &asker("a", late)).unwrap();
        }
        assert_eq!(fires, [3, 4, 5, 6, 7]);

        let last = schedule(&format!("{start}, catch_up = 'last'"));
        let skipped = noted(&last, Some(&noted(&last, None, late)), late);
        let run = skipped.run.as_ref().unwrap();
        assert_eq!((run.state, run.from, run.to), (State::Skipped, 2 * HOUR, 6 * HOUR));
        assert_eq!(run.error.as_deref(), Some("4 missed, catch_up = 'last'"));
        assert_eq!(fire(&begun(&last, &skipped, late)), (7, 6, 7, 1));
        let only = noted(&last, None, 3 * HOUR);
        assert_eq!(fire(&begun(&last, &only, 3 * HOUR)).0, 3, "one alone is not skipped");

        let none = schedule(&format!("{start}, catch_up = 'none'"));
        let skipped = noted(&none, Some(&noted(&none, None, late)), late);
        assert_eq!(skipped.settled, 7 * HOUR);
        assert_eq!(
            next(&none, Some(&skipped), &asker("a", late)).unwrap(),
            Step::Sleep { until: 8 * HOUR, retry: false }
        );
        let soon = 8 * HOUR + MINUTE;
        assert_eq!(fire(&begun(&none, &skipped, soon)).0, 8, "it is in time");
    }

    #[test]
    fn failures_are_tried_again_later_and_later_and_then_made_up_for() {
        let hourly = schedule("retries = '2', retry_delay = '20 minutes', start = '1970-01-01 03:00:00'");
        let mut now = 3 * HOUR;
        let mut entry = noted(&hourly, None, now);
        for (attempt, pause) in [(1, Some(20)), (2, Some(40)), (3, None)] {
            let claim = begun(&hourly, &entry, now);
            assert_eq!(fire(&claim), (3, 2, 3, attempt));
            entry = ended(&hourly, &claim, Outcome::Failed("no".to_owned()), &asker("a", now)).unwrap();
            match pause {
                Some(minutes) => {
                    let until = now + minutes * MINUTE;
                    let step = next(&hourly, Some(&entry), &asker("b", until - 1)).unwrap();
                    assert_eq!(step, Step::Sleep { until, retry: true });
                    now = until;
                }
                None => assert_eq!((&entry.now, entry.settled), (&Now::Idle, 3 * HOUR)),
            }
        }
        assert_eq!(fire(&begun(&hourly, &entry, 4 * HOUR)), (4, 2, 4, 1));
        assert_eq!(delay(&hourly, 3), HOUR, "no pause is longer");
        let slow = schedule("retry_delay = '2 hours'");
        assert_eq!(delay(&slow, 70), 2 * HOUR);
    }

    #[test]
    fn an_interval_that_was_not_reached_is_begun_again() {
        let hourly = schedule("start = '1970-01-01 03:00:00'");
        let claim = begun(&hourly, &noted(&hourly, None, 3 * HOUR), 3 * HOUR);
        let outcome = Outcome::Succeeded { rows: 0, reached: Some(2 * HOUR) };
        let entry = ended(&hourly, &claim, outcome, &asker("a", 3 * HOUR)).unwrap();
        let claim = begun(&hourly, &entry, 4 * HOUR);
        assert_eq!(fire(&claim), (4, 2, 4, 1));
        let whole = Outcome::Succeeded { rows: 0, reached: None };
        assert_eq!(ended(&hourly, &claim, whole, &asker("a", 4 * HOUR)).unwrap().carry, None);
    }

    /// Random lives: every fire is settled once and in order, one runs at a time, and stops and losses never end it.
    #[test]
    fn every_fire_is_settled_once_whatever_happens() {
        let seed = crate::stream::clock::Clock.unix_micros() as u64;
        println!("seed {seed}");
        let mut dice = Dice(seed);
        for _ in 0..300 {
            let retries = dice.roll(3);
            let schedule = schedule(&format!("retries = '{retries}', start = '1970-01-02'"));
            let mut last: Option<Entry> = None;
            let mut settled: Vec<Micros> = Vec::new();
            let mut failures = BTreeMap::<Micros, u64>::new();
            let mut now = DAY;
            for _ in 0..200 {
                let who = if dice.chance(50) { "a" } else { "b" };
                let mut asker = asker(who, now);
                let step = next(&schedule, last.as_ref(), &asker).unwrap();
                let entry = match (step, &last) {
                    (Step::Note(entry) | Step::Start(entry), _) => *entry,
                    (Step::Sleep { until, .. }, _) => {
                        assert!(until > now);
                        now = until;
                        continue;
                    }
                    (Step::Watch { .. }, Some(claim)) => {
                        asker.writer = claim.writer.clone();
                        let outcome = match dice.roll(6) {
                            0 => Outcome::Stopped,
                            1 => Outcome::Lost("dead".to_owned()),
                            2 => Outcome::Failed("no".to_owned()),
                            _ => Outcome::Succeeded { rows: 1, reached: None },
                        };
                        let fire = claim.run.as_ref().unwrap().fire;
                        if matches!(outcome, Outcome::Failed(_)) {
                            *failures.entry(fire).or_default() += 1;
                        }
                        ended(&schedule, claim, outcome, &asker).unwrap()
                    }
                    (Step::Watch { .. }, None) => panic!("nobody runs"),
                };
                let round: Entry = serde_json::from_slice(&serde_json::to_vec(&entry).unwrap()).unwrap();
                assert_eq!(round, entry);
                if let (Some(before), Some(run)) = (&last, &entry.run)
                    && entry.settled > before.settled
                {
                    assert_eq!(entry.settled, run.fire);
                    settled.push(run.fire);
                    let failed = failures.get(&run.fire).copied().unwrap_or(0);
                    assert!(failed <= retries + 1 && (failed > retries) == (run.state == State::Failed));
                }
                last = Some(entry);
                now += dice.roll(40) as i64 * MINUTE;
            }
            let expected: Vec<Micros> = (24..).map(|hour| hour * HOUR).take(settled.len()).collect();
            assert_eq!(settled, expected);
            assert!(settled.len() > 10);
        }
    }
}
