//! `millstream test`: the cases of fixture files, each as a stream and as a batch.
//!
//! Both must give the rows that the case expects. The stream is run several times by different seeds (`stream`), the
//! batch once, over the rows that the source accepted: without late rows where the view closes by time, and without
//! rows on which one of its expressions failed (DESIGN §3). Differences go to stdout, progress to stderr.

mod arrange;
mod case;
mod compare;
mod fixture;
mod rows;
mod stream;
mod yaml;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{environment, output, overrides};
use crate::error::{Error, Result};
use crate::sql::{Catalog, Variables, catalog};
use crate::stream::clock::Clock;
use case::{Bench, Verdict};
use fixture::{Case, Fixture};

/// Below `millstream test --help`.
const EXAMPLE: &str = "\
A fixture, sql/p.test.yaml beside sql/p.sql:
  cases:
    - name: what it shows
      input:
        a_source: [{id: 1, at: 2026-01-02T00:00:00Z}, this is a bad record]
      expect:
        a_view: [{id: 1, n: 1}]
        a_sink: {partial: true, csv: \"id\\n1\"}
      late: 0
      dead_letters: 1
Rows are YAML maps (rows:, or the list alone), csv:, ndjson: or file: (a path from the fixture's folder). \
partial: more rows and columns are fine; tolerance: of floats. pipeline: names other SQL files, variables: sets ${…}.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub struct TestArgs {
    /// Folders, SQL files (their fixture lies beside them: p.test.yaml beside p.sql) or fixtures.
    #[arg(default_value = "./sql")]
    files: Vec<PathBuf>,
    /// Sets a ${VARIABLE} of the SQL files, before the fixture's variables and the environment.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Runs only the cases whose name contains this; may be given again.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// How often each case runs as a stream, with other cuts, order, partitions and restarts each time.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rounds: u64,
    /// Where the seeds of the rounds begin; default: another one each time.
    #[arg(long)]
    seed: Option<u64>,
}

/// # Errors
/// User: no fixture, a fixture or SQL that cannot be read, `--case` that fits none. External: no folder for state.
pub async fn run(args: TestArgs) -> Result<ExitCode> {
    let paths = fixture::find(&args.files)?;
    let fixtures = paths.iter().map(|path| fixture::read(path)).collect::<Result<Vec<_>>>()?;
    let chosen = |case: &Case| args.case.is_empty() || args.case.iter().any(|part| case.name.contains(part));
    let total = fixtures.iter().flat_map(|fixture| &fixture.cases).filter(|case| chosen(case)).count();
    if total == 0 {
        let names: Vec<&str> =
            fixtures.iter().flat_map(|f| &f.cases).map(|case| case.name.as_str()).collect();
        return Err(Error::user("--case fits no case").hint(format!("The cases are: {}.", names.join("; "))));
    }
    // Small enough to be typed again.
    let seed = args.seed.unwrap_or_else(|| Clock.unix_micros().unsigned_abs() % 1_000_000);
    let folder = tempfile::tempdir()
        .map_err(|error| Error::external("there is no folder for the state of the tests").because(error))?;
    let mut bench = Bench::new(folder.path().to_owned(), seed, args.rounds);
    let mut failed = 0;
    for fixture in &fixtures {
        for case in fixture.cases.iter().filter(|case| chosen(case)) {
            let verdict = bench.run(case, &load(fixture, case, &args.set)?).await?;
            failed += usize::from(!verdict.faults.is_empty());
            report(fixture, case, &verdict, &args)?;
        }
    }
    let rounds = if args.rounds == 1 { "1 round".to_owned() } else { format!("{} rounds", args.rounds) };
    let cases = if total == 1 { "1 case".to_owned() } else { format!("{total} cases") };
    eprintln!("{cases}, {failed} failed ({rounds} as a stream and one batch each, seed {seed})");
    Ok(ExitCode::from(u8::from(failed > 0)))
}

fn load(fixture: &Fixture, case: &Case, set: &[String]) -> Result<Catalog> {
    let mut values: BTreeMap<String, String> = fixture.variables.clone();
    values.extend(case.variables.clone());
    values.extend(overrides(set)?);
    let variables = Variables { overrides: values, environment: &environment };
    let paths = catalog::pipeline_files(&fixture.pipeline)?;
    let texts = paths.iter().map(|path| catalog::read(path)).collect::<Result<Vec<_>>>()?;
    Catalog::load(&texts, &variables)
}

fn report(fixture: &Fixture, case: &Case, verdict: &Verdict, args: &TestArgs) -> Result<()> {
    let place = format!("{}:{}", fixture.path.display(), case.place.line);
    let mark = if verdict.faults.is_empty() { "ok    " } else { "FAILED" };
    eprintln!("{mark}  {place}  {}", case.name);
    let mut text = String::new();
    for fault in &verdict.faults {
        text.push_str(&format!("{place}: {}\n  {}\n", case.name, fault.what));
        for line in fault.details.lines() {
            text.push_str(format!("    {line}").trim_end());
            text.push('\n');
        }
        if let Some(seed) = fault.seed {
            let set: String = args.set.iter().map(|set| format!(" --set {}", quoted(set))).collect();
            let (file, name) = (fixture.path.display().to_string(), quoted(&case.name));
            let file = quoted(&file);
            text.push_str(&format!(
                "  again: millstream test {file}{set} --case {name} --seed {seed} --rounds 1\n"
            ));
        }
        text.push('\n');
    }
    output::text(&text)
}

/// For a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}
