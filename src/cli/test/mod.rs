//! `millstream test`: the cases of fixture files, each as a stream and as a batch.
//!
//! Both must give the rows that the case expects. The stream is run several times by different seeds (`stream`), the
//! batch once, over the rows that the source accepted: without late rows where the view closes by time, and without
//! rows on which one of its expressions failed (DESIGN §3). With `--random` the rows are random ones and the batch
//! says what is expected. Differences go to stdout, progress to stderr.

mod arrange;
mod case;
mod compare;
mod fixture;
mod generate;
mod random;
mod rows;
mod stream;
mod target;
mod words;
mod yaml;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use futures::StreamExt;

use super::{environment, output, overrides};
use crate::connectors::sandbox::Sandbox;
use crate::error::{Error, Result};
use crate::sql::{Catalog, Variables, catalog};
use crate::stream::clock::Clock;
use case::{Bench, Verdict};
use fixture::{Case, Fixture};
use random::Pipeline;

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
partial: more rows and columns are fine; tolerance: of floats. pipeline: names other SQL files, variables: sets ${…}.

Random rows, with or without a fixture: millstream test sql/p.sql --random 1000
Values are made up by type and by what the SQL compares them with; a fixture can name others:
  random: {a_source: {currency: [EUR, USD, null], address: {zip: ['02139']}}}";

/// Random cases at a time: a case waits more than it computes.
const AT_A_TIME: usize = 8;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub struct TestArgs {
    /// Folders, SQL files (their fixture lies beside them: p.test.yaml beside p.sql) or fixtures.
    #[arg(default_value = "./sql")]
    files: Vec<PathBuf>,
    /// Sets a ${VARIABLE} of the SQL files, before the fixture's variables and the environment.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Refuses SQL and fixtures that name files outside this folder, or s3://bucket/prefix; may be given again.
    #[arg(long, value_name = "ROOT")]
    sandbox: Vec<String>,
    /// Runs only the cases whose name contains this; may be given again.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// How often each case runs as a stream, with other cuts, order, partitions and restarts each time.
    /// Default: 6, with --random 1.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rounds: Option<u64>,
    /// Where the seeds of the rounds begin; default: another one each time.
    #[arg(long)]
    seed: Option<u64>,
    /// Sends this many cases of random rows through each pipeline and compares all its views and sinks with the batch.
    #[arg(long, value_name = "CASES", conflicts_with = "case", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    random: Option<u64>,
    /// Most rows of each source in a random case.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rows: u64,
}

/// # Errors
/// User: no fixture, a fixture or SQL that cannot be read, `--case` that fits none. External: no folder for state.
pub async fn run(args: TestArgs) -> Result<ExitCode> {
    // Small enough to be typed again.
    let seed = args.seed.unwrap_or_else(|| Clock.unix_micros().unsigned_abs() % 1_000_000);
    let folder = tempfile::tempdir()
        .map_err(|error| Error::external("there is no folder for the state of the tests").because(error))?;
    let rounds = args.rounds.unwrap_or(if args.random.is_some() { 1 } else { 6 });
    let bench = Bench::new(folder.path().to_owned(), seed, rounds);
    match args.random {
        Some(cases) => random_cases(&args, &bench, seed, rounds, cases).await,
        None => fixtures(&args, &bench, seed, rounds).await,
    }
}

async fn fixtures(args: &TestArgs, bench: &Bench, seed: u64, rounds: u64) -> Result<ExitCode> {
    let sandbox = Sandbox::new(&args.sandbox)?;
    let paths = fixture::find(&args.files)?;
    let fixtures = paths.iter().map(|path| fixture::read(path, &sandbox)).collect::<Result<Vec<_>>>()?;
    let chosen = |case: &Case| args.case.is_empty() || args.case.iter().any(|part| case.name.contains(part));
    let total = fixtures.iter().flat_map(|fixture| &fixture.cases).filter(|case| chosen(case)).count();
    if total == 0 {
        let names: Vec<&str> =
            fixtures.iter().flat_map(|f| &f.cases).map(|case| case.name.as_str()).collect();
        return Err(Error::user("--case fits no case").hint(format!("The cases are: {}.", names.join("; "))));
    }
    let mut failed = 0;
    for fixture in &fixtures {
        for case in fixture.cases.iter().filter(|case| chosen(case)) {
            let mut variables = fixture.variables.clone();
            variables.extend(case.variables.clone());
            let verdict = bench.run(case, &load(&fixture.pipeline, variables, &args.set, &sandbox)?).await?;
            failed += usize::from(!verdict.faults.is_empty());
            report(fixture, case, &verdict, args)?;
        }
    }
    let rounds = if rounds == 1 { "1 round".to_owned() } else { format!("{rounds} rounds") };
    let cases = if total == 1 { "1 case".to_owned() } else { format!("{total} cases") };
    eprintln!("{cases}, {failed} failed ({rounds} as a stream and one batch each, seed {seed})");
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// Every case of every pipeline, several at a time, reported in the order of their seeds.
async fn random_cases(
    args: &TestArgs,
    bench: &Bench,
    seed: u64,
    rounds: u64,
    cases: u64,
) -> Result<ExitCode> {
    let sandbox = Sandbox::new(&args.sandbox)?;
    let (mut total, mut failed) = (0, 0);
    for found in fixture::pipelines(&args.files, &sandbox)? {
        let catalog = load(&found.files, found.variables, &args.set, &sandbox)?;
        if catalog.sources.is_empty() && catalog.sinks.is_empty() && !catalog.schedules.is_empty() {
            // Only says when others run.
            continue;
        }
        if catalog.sources.is_empty() {
            return Err(Error::user(format!("{} declares no source", found.path.display()))
                .hint("Name its files in a fixture: pipeline: [transactions.sql, user_totals.sql]."));
        }
        let pipeline = Pipeline::plan(&catalog, found.random, bench).await?;
        let path = found.path.display().to_string();
        for what in &pipeline.left_out {
            eprintln!("        {path}: {what} is left out, it joins with a table on a server");
        }
        let rows = usize::try_from(args.rows).unwrap_or(usize::MAX);
        let run = |number: u64| {
            let (pipeline, seed) = (&pipeline, seed.wrapping_add(number));
            async move { (seed, pipeline.case(bench, seed, rows, rounds).await) }
        };
        let mut verdicts = futures::stream::iter((0..cases).map(run)).buffered(AT_A_TIME);
        let before = failed;
        while let Some((seed, verdict)) = verdicts.next().await {
            total += 1;
            if let Some(failure) = verdict? {
                failed += 1;
                let set: String = args.set.iter().map(|set| format!(" --set {}", quoted(set))).collect();
                let again = format!(
                    "millstream test {}{set} --random 1 --seed {seed} --rows {} --rounds {rounds}",
                    quoted(&path),
                    args.rows
                );
                output::text(&failure.text(&format!("{path}: random rows, seed {seed}"), &again))?;
            }
        }
        let mark = if failed == before { "ok    " } else { "FAILED" };
        eprintln!("{mark}  {path}: {cases} random cases, {} failed", failed - before);
    }
    eprintln!("{total} random cases, {failed} failed (seeds {seed} to {})", seed.wrapping_add(cases - 1));
    Ok(ExitCode::from(u8::from(failed > 0)))
}

fn load(
    files: &[PathBuf],
    variables: BTreeMap<String, String>,
    set: &[String],
    sandbox: &Sandbox,
) -> Result<Catalog> {
    let mut values = variables;
    values.extend(overrides(set)?);
    let variables = Variables { overrides: values, environment: &environment };
    let paths = catalog::pipeline_files(files)?;
    let texts = paths.iter().map(|path| catalog::read(path)).collect::<Result<Vec<_>>>()?;
    let catalog = Catalog::load(&texts, &variables)?;
    crate::plan::sandbox::check(&catalog, sandbox)?;
    Ok(catalog)
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
