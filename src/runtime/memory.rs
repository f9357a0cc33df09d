//! The budget of memory: `run --memory`, by default 70 % of what the machine or the container allows.
//!
//! What counts is the resident memory of the process, looked at four times a second: it holds state, queues and what the
//! client libraries have fetched, without a counter in any hot path. Above [`SHORT`] of the budget the allocator gives
//! free memory back to the system; if that does not help, memory is *short*: partitions whose watermark is ahead of the
//! source's pause until [`ENOUGH`] is reached, and the one that holds the others back never does (DESIGN §5). What waits
//! for the watermark then shrinks as it rises.
//!
//! What becomes final at once comes on top: an operator gives all of it in one go.
//!
//! State that is itself larger than the budget neither spills nor is dropped. When memory is above the whole budget at
//! [`STRIKES`] checkpoints in a row, in spite of the pause, the pipeline takes a last checkpoint and stops with an error
//! that says which view or sink holds how much.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::error::Error;
use crate::runtime::metrics::Metrics;
use crate::state::manifest::Manifest;

/// Per cent of the budget above which partitions pause, and below which they go on.
pub const SHORT: u64 = 80;
const ENOUGH: u64 = 70;
/// Per cent of what is allowed that the budget is without an option.
const DEFAULT_SHARE: u64 = 70;
/// Checkpoints in a row above the budget after which the pipeline stops.
pub const STRIKES: u32 = 3;
const EVERY: Duration = Duration::from_millis(250);

const MIB: u64 = 1 << 20;

/// The default budget; `None` where the system does not say what it has.
pub fn default_budget() -> Option<u64> {
    Some(allowed()? / 100 * DEFAULT_SHARE)
}

/// Looks at the memory of the process until it is dropped.
pub async fn watch(metrics: Arc<Metrics>, budget: u64) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    metrics.budget.store(budget, Ordering::Relaxed);
    loop {
        ticks.tick().await;
        let Some(mut resident) = resident() else { return };
        if resident > share(budget, SHORT) {
            give_back();
            resident = self::resident().unwrap_or(resident);
        }
        metrics.resident.store(resident, Ordering::Relaxed);
        let before = metrics.short.load(Ordering::Relaxed);
        let short = resident > share(budget, if before { ENOUGH } else { SHORT });
        metrics.short.store(short, Ordering::Relaxed);
        if short && !before {
            let (resident, budget) = (resident / MIB, budget / MIB);
            tracing::warn!(
                "memory is short: {resident} MiB of a budget of {budget} MiB; partitions ahead of the watermark wait"
            );
        }
    }
}

fn share(budget: u64, percent: u64) -> u64 {
    budget / 100 * percent
}

/// Why a pipeline stops whose state is larger than the budget.
pub fn too_large(resident: u64, budget: u64, last: &Manifest) -> Error {
    let mut held: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for file in &last.files {
        let (rows, bytes) = held.entry(file.node.as_str()).or_default();
        (*rows, *bytes) = (*rows + file.rows, *bytes + file.bytes);
    }
    let mut held: Vec<(&str, (u64, u64))> = held.into_iter().collect();
    held.sort_by_key(|(_, (rows, _))| std::cmp::Reverse(*rows));
    let mut message = format!(
        "the state is larger than the budget of memory: {} MiB are used, {} MiB are allowed",
        resident / MIB,
        budget / MIB
    );
    for (node, (rows, bytes)) in held {
        message.push_str(&format!("\n  {node}: {rows} rows, {} KiB in state files", bytes / 1024));
    }
    Error::external(message).hint(
        "Nothing is lost, the last checkpoint is written. Give it more --memory, let a window, a ttl or the lateness be \
         shorter, or split the keys over several pipelines; state does not spill to disk.",
    )
}

/// The process's resident memory.
#[cfg(target_os = "linux")]
fn resident() -> Option<u64> {
    in_kib(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

#[cfg(not(target_os = "linux"))]
fn resident() -> Option<u64> {
    None
}

/// The least of what the machine has and what the control groups allow, of version 1 and 2.
fn allowed() -> Option<u64> {
    let machine = in_kib(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:");
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits =
        limit_files(&groups).into_iter().filter_map(|path| limit(&std::fs::read_to_string(path).ok()?));
    machine.into_iter().chain(limits).min()
}

/// Where the limits of the process's groups may stand, from `/proc/self/cgroup`; a limit of a parent counts too. Inside a
/// container the group's own folder is often the root of what can be seen.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            of if of.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mut path = path.trim_end_matches('/');
        loop {
            files.push(format!("{root}{path}/{name}"));
            match path.rsplit_once('/') {
                Some((parent, _)) => path = parent,
                None => break,
            }
        }
    }
    files
}

/// `max` is none; version 1 writes a number of pages that no machine has.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|limit| *limit < 1 << 60)
}

fn in_kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Gives free memory back to the system: glibc keeps it otherwise, and what was freed would still count.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    #![allow(
        unsafe_code,
        reason = "declares a function of the C library that takes a number and is safe to call"
    )]
    unsafe extern "C" {
        safe fn malloc_trim(pad: usize) -> std::ffi::c_int;
    }
    malloc_trim(0);
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_both_versions_of_control_groups_are_found() {
        let v2 = limit_files("0::/a.slice/b.scope\n");
        let root = "/sys/fs/cgroup";
        assert_eq!(
            v2,
            [
                format!("{root}/a.slice/b.scope/memory.max"),
                format!("{root}/a.slice/memory.max"),
                format!("{root}/memory.max")
            ]
        );
        let v1 = limit_files("5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n");
        assert_eq!(
            v1,
            [
                format!("{root}/memory/docker/1/memory.limit_in_bytes"),
                format!("{root}/memory/docker/memory.limit_in_bytes"),
                format!("{root}/memory/memory.limit_in_bytes"),
                format!("{root}/memory.max"),
            ]
        );
        assert_eq!(limit("max\n"), None);
        assert_eq!(limit("9223372036854771712\n"), None);
        assert_eq!(limit("536870912\n"), Some(512 * MIB));
        assert_eq!(in_kib("Name:\tx\nVmRSS:\t   2048 kB\n", "VmRSS:"), Some(2 * MIB));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_says_what_it_has() {
        let (used, budget) = (resident().unwrap(), default_budget().unwrap());
        assert!(used > MIB && budget > MIB);
        give_back();
    }
}
