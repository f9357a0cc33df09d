//! The grammar of `CREATE SCHEDULE`; what it means is in [`super::calendar`] and the docs of [`CreateSchedule`].

use std::time::Duration;

use chrono_tz::{TZ_VARIANTS, Tz};
use datafusion::sql::parser::Statement as DfStatement;
use sqlparser::ast;

use crate::error::{Error, Place, Result};
use crate::sql::calendar::Calendar;
use crate::sql::create::interval_micros;
use crate::sql::cron::Cron;
use crate::sql::options::{Options, nearest};
use crate::sql::parser::{Reader, normal};
use crate::sql::statement::{CatchUp, CreateSchedule, ScheduleAction, ScheduledInsert, Statement};
use crate::stream::Micros;

const RETRIES: u32 = 3;
const RETRY_DELAY: Duration = Duration::from_secs(60);

impl Reader<'_> {
    /// Behind `CREATE SCHEDULE`.
    pub(super) fn schedule(&mut self, or_replace: bool, place: Place) -> Result<Statement> {
        let name = self.name()?;
        let owner = format!("schedule {name}");
        self.expect_word("CRON")?;
        let token = self.peek(0);
        let cron = self.string("a cron expression such as '0 2 * * *'")?;
        let parsed = Cron::parse(&cron)
            .map_err(|(message, hint)| Error::user(message).hint(hint).at(self.place(&token)))?;
        let zone = match self.take_word("TIME") {
            true => self.time_zone()?,
            false => Tz::UTC,
        };
        let calendar = Calendar { cron: parsed, zone };
        if calendar.fires_after(0).next().is_none() {
            let error = Error::user(format!("'{cron}' never fires")).hint("No month has that day.");
            return Err(error.at(self.place(&token)));
        }
        let before = if self.is_word(0, "WITH") { Some(self.options(&owner)?) } else { None };
        self.expect_word("AS")?;
        let token = self.peek(0);
        let (action, behind) = if self.take_word("BACKFILL") {
            let action = self.backfill()?;
            (action, if self.is_word(0, "WITH") { Some(self.options(&owner)?) } else { None })
        } else if self.is_word(0, "INSERT") {
            self.insert(before.is_some(), &owner)?
        } else {
            return Err(self.expected("BACKFILL or INSERT", &token));
        };
        if let (Some(_), Some(_)) = (&before, &behind) {
            return Err(Error::user(format!("{owner} has options twice"))
                .hint("Leave one WITH (…) out.")
                .at(place));
        }
        let options = before.or(behind).unwrap_or_else(|| Options::new(owner, []));
        let (catch_up, retries, retry_delay_micros, start) =
            settings(options, zone).map_err(|error| error.at(place.clone()))?;
        let schedule = CreateSchedule {
            name,
            or_replace,
            cron,
            calendar,
            action,
            catch_up,
            retries,
            retry_delay_micros,
            start,
            place,
        };
        Ok(Statement::CreateSchedule(Box::new(schedule)))
    }

    fn time_zone(&mut self) -> Result<Tz> {
        self.expect_word("ZONE")?;
        let token = self.peek(0);
        let name = self.string("a time zone such as 'Europe/Berlin'")?;
        name.parse::<Tz>().map_err(|_| {
            let known: Vec<String> = TZ_VARIANTS.iter().map(|zone| zone.name().to_owned()).collect();
            let hint = match nearest(&name, &known) {
                Some(near) => format!("Did you mean {near}?"),
                None => "Give a name of the IANA database, such as 'Europe/Berlin' or 'UTC'.".to_owned(),
            };
            Error::user(format!("the time zone '{name}' is not known")).hint(hint).at(self.place(&token))
        })
    }

    fn backfill(&mut self) -> Result<ScheduleAction> {
        let place = self.place(&self.peek(0));
        let sink = self.name()?;
        self.expect_word("FOR")?;
        self.expect_word("LAST")?;
        let at = self.place(&self.peek(0));
        let expr = self.expr()?;
        let last_micros = interval_micros(&expr).map_err(|error| error.at(at.clone()))?;
        if last_micros <= 0 || last_micros % 1_000_000 != 0 {
            let error = Error::user("the interval of a scheduled backfill must be a number of seconds");
            return Err(error.hint("Write one such as INTERVAL '1 day'.").at(at));
        }
        Ok(ScheduleAction::Backfill { sink, place, last_micros })
    }

    /// The statement, and the options behind it: sqlparser would take `FROM t WITH (…)` for hints about the table.
    fn insert(&mut self, has_options: bool, owner: &str) -> Result<(ScheduleAction, Option<Options>)> {
        let place = self.place(&self.peek(0));
        let start = self.inner.parser.index();
        let end = match self.trailing_options() {
            Some(at) if !has_options && at >= start => at,
            _ => self.tokens.len(),
        };
        let mut part = Reader::new(self.source, &self.tokens[start..end])?;
        let statement = part.delegate(&place)?;
        part.expect_end()?;
        self.skip(end - start);
        let options = if self.is_word(0, "WITH") { Some(self.options(owner)?) } else { None };
        let insert = scheduled_insert(statement, &place)
            .map_err(|(message, hint)| Error::user(message).hint(hint).at(place))?;
        Ok((ScheduleAction::Insert(Box::new(insert)), options))
    }
}

fn scheduled_insert(
    statement: DfStatement,
    place: &Place,
) -> Result<ScheduledInsert, (String, &'static str)> {
    const FORM: &str = "Write INSERT INTO table [(columns)] SELECT ….";
    let unclear = |what: &str| (format!("{what} cannot be scheduled"), FORM);
    let DfStatement::Statement(statement) = statement else { return Err(unclear("this statement")) };
    let ast::Statement::Insert(insert) = *statement else { return Err(unclear("this statement")) };
    if insert.overwrite || insert.replace_into || insert.or.is_some() || insert.on.is_some() {
        return Err(unclear("an INSERT that replaces rows"));
    }
    if insert.returning.is_some() || insert.partitioned.is_some() || !insert.after_columns.is_empty() {
        return Err(unclear("an INSERT with RETURNING or PARTITION"));
    }
    let one_part = |name: &ast::ObjectName| match name.0.as_slice() {
        [part] => part.as_ident().map(normal),
        _ => None,
    };
    let table = match &insert.table {
        ast::TableObject::TableName(name) => one_part(name),
        _ => None,
    };
    let table = table.ok_or_else(|| unclear("an INSERT into what is no table of the pipeline"))?;
    let columns: Option<Vec<String>> = insert.columns.iter().map(one_part).collect();
    let columns = columns.ok_or_else(|| unclear("an INSERT into parts of columns"))?;
    let query = insert.source.ok_or_else(|| unclear("an INSERT without a query"))?;
    Ok(ScheduledInsert { table, columns, query, place: place.clone() })
}

type Settings = (CatchUp, u32, i64, Option<Micros>);

fn settings(mut options: Options, zone: Tz) -> Result<Settings> {
    let catch_up = match options.choice("catch_up", &CatchUp::NAMES)? {
        None | Some(0) => CatchUp::All,
        Some(1) => CatchUp::Last,
        Some(_) => CatchUp::None,
    };
    let retries = options.parse::<u32>("retries", "a number such as 3")?.unwrap_or(RETRIES);
    let delay = options.duration("retry_delay")?.unwrap_or(RETRY_DELAY);
    let (place, owner) = (options.place("start"), options.owner().to_owned());
    let start = match options.string("start")? {
        None => None,
        Some(text) => Some(moment(&text, zone).ok_or_else(|| {
            let error = Error::user(format!("{owner}: start = '{text}' is no time"))
                .hint("Write 2026-01-31, 2026-01-31 06:00:00 (both in the schedule's time zone), or 2026-01-31T06:00:00Z.");
            match place {
                Some(place) => error.at(place),
                None => error,
            }
        })?),
    };
    options.finish()?;
    Ok((catch_up, retries, i64::try_from(delay.as_micros()).unwrap_or(i64::MAX), start))
}

fn moment(text: &str, zone: Tz) -> Option<Micros> {
    use chrono::{DateTime, NaiveDate, NaiveDateTime, TimeZone};
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(time.timestamp_micros());
    }
    let naive = ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M"];
    let naive = naive.iter().find_map(|form| NaiveDateTime::parse_from_str(text, form).ok());
    let naive = naive.or_else(|| NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.and_hms_opt(0, 0, 0))?;
    Some(zone.from_local_datetime(&naive).earliest()?.timestamp_micros())
}
