//! Records that are broken on purpose: `dev --inject-bad N` shows that a bad record is counted and kept aside, and
//! that the pipeline goes on.
//!
//! Of the records that a sink writes every N-th is broken, in turn in one of the ways that a producer gets wrong:
//! cut off (no JSON), a NOT NULL field left out, a text in a field of another type, an event time in the year 2099.
//! Ways that the source's columns do not offer are left out. What is broken depends on the order of records only.

use std::num::NonZeroU64;

use serde_json::{Map, Value};

/// How records of a sink are broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRecords {
    /// One of so many.
    pub every: NonZeroU64,
    /// A field that must not be missing.
    pub required: Option<String>,
    /// A field that cannot hold a text.
    pub typed: Option<String>,
    /// Fields that make the event time.
    pub time: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    NotJson,
    Missing,
    Type,
    Future,
}

/// Counts the records of a sink and breaks some of them.
#[derive(Debug)]
pub struct Breaker {
    plan: BadRecords,
    faults: Vec<Fault>,
    seen: u64,
}

impl Breaker {
    pub fn new(plan: BadRecords) -> Self {
        let mut faults = vec![Fault::NotJson];
        faults.extend(plan.required.as_ref().map(|_| Fault::Missing));
        faults.extend(plan.typed.as_ref().map(|_| Fault::Type));
        faults.extend((!plan.time.is_empty()).then_some(Fault::Future));
        Self { plan, faults, seen: 0 }
    }

    /// What to write instead of the next record; `None`: the record itself.
    pub fn next(&mut self, record: &[u8]) -> Option<Vec<u8>> {
        self.seen += 1;
        let every = self.plan.every.get();
        if !self.seen.is_multiple_of(every) {
            return None;
        }
        let turn = (self.seen / every - 1) % self.faults.len() as u64;
        Some(self.broken(self.faults[usize::try_from(turn).unwrap_or(0)], record))
    }

    fn broken(&self, fault: Fault, record: &[u8]) -> Vec<u8> {
        let cut_off = || record[..record.len() / 2].to_vec();
        let Ok(Value::Object(mut fields)) = serde_json::from_slice::<Value>(record) else { return cut_off() };
        match fault {
            Fault::NotJson => return cut_off(),
            Fault::Missing => {
                self.plan.required.as_ref().map(|field| fields.remove(field));
            }
            Fault::Type => {
                let text = Value::from("not what was declared");
                self.plan.typed.iter().for_each(|field| set(&mut fields, field, text.clone()));
            }
            Fault::Future => {
                for field in &self.plan.time {
                    if let Some(value) = fields.get(field).and_then(in_2099) {
                        set(&mut fields, field, value);
                    }
                }
            }
        }
        serde_json::to_vec(&fields).unwrap_or_else(|_| cut_off())
    }
}

fn set(fields: &mut Map<String, Value>, field: &str, value: Value) {
    fields.insert(field.to_owned(), value);
}

/// The same kind of time in the year 2099: a text that begins with a year, or a number since 1970 whose unit its size
/// tells; `None` when it is neither.
fn in_2099(value: &Value) -> Option<Value> {
    const SECONDS: i64 = 4_073_587_200;
    match value {
        Value::String(text) if text.get(..4)?.bytes().all(|b| b.is_ascii_digit()) => {
            Some(Value::from(format!("2099{}", &text[4..])))
        }
        Value::Number(number) => {
            let per_second = match number.as_f64()?.abs() {
                ..1e8 => return None,
                ..1e11 => 1,
                ..1e14 => 1_000,
                ..1e17 => 1_000_000,
                _ => 1_000_000_000,
            };
            Some(Value::from(SECONDS.saturating_mul(per_second)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(every: u64, time: &[&str]) -> Breaker {
        let field = |name: &str| Some(name.to_owned());
        Breaker::new(BadRecords {
            every: NonZeroU64::new(every).unwrap(),
            required: field("id"),
            typed: field("id"),
            time: time.iter().map(|name| (*name).to_owned()).collect(),
        })
    }

    fn texts(breaker: &mut Breaker, record: &str, count: usize) -> Vec<Option<String>> {
        let next = |_| breaker.next(record.as_bytes()).map(|bytes| String::from_utf8(bytes).unwrap());
        (0..count).map(next).collect()
    }

    #[test]
    fn every_nth_record_is_broken_in_turn() {
        let broken = texts(&mut breaker(2, &["t"]), r#"{"id":7,"t":1795232621000}"#, 10);
        assert_eq!(broken.iter().step_by(2).flatten().count(), 0);
        let broken: Vec<String> = broken.into_iter().flatten().collect();
        assert_eq!(
            broken,
            [
                r#"{"id":7,"t":1"#,
                r#"{"t":1795232621000}"#,
                r#"{"id":"not what was declared","t":1795232621000}"#,
                r#"{"id":7,"t":4073587200000}"#,
                r#"{"id":7,"t":1"#
            ]
        );
    }

    #[test]
    fn times_keep_their_unit() {
        let future = |value: Value| in_2099(&value);
        assert_eq!(future("2026-11-21T08:00:00Z".into()), Some("2099-11-21T08:00:00Z".into()));
        assert_eq!(future(1_795_232_621_i64.into()), Some(4_073_587_200_i64.into()));
        assert_eq!(future(1_795_232_621_000_000_i64.into()), Some(4_073_587_200_000_000_i64.into()));
        assert_eq!([future(17.into()), future("soon".into()), future(Value::Null)], [None, None, None]);
    }

    #[test]
    fn what_is_no_object_is_cut_off() {
        let broken = texts(&mut breaker(1, &[]), "[1,2]", 3);
        assert!(broken.iter().all(|text| text.as_deref() == Some("[1")), "{broken:?}");
    }
}
