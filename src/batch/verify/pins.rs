//! Which versions are compared, and up to where: the sink's table and the backup pinned, then the state read.

use arrow::array::{Array, AsArray};
use arrow::datatypes::Int64Type;

use super::{Report, Verifier};
use crate::batch::history::{Backup, backup_of};
use crate::batch::letters::{Record, State, open};
use crate::connectors::delta::table::{AsOf, progress, provider_as_of};
use crate::error::{Error, Result};
use crate::plan::SinkKind;
use crate::plan::session::batch_session_within;
use crate::state::manifest::Manifest;
use crate::stream::Micros;

/// Waits between looks at a backup that is behind its sink, ms: both commit the same epoch, one a moment after the other.
const PAUSES: [u64; 4] = [0, 200, 1_000, 3_000];

/// What a table says of itself.
#[derive(Default)]
pub struct Committed {
    pub version: u64,
    pub epoch: Option<i64>,
    /// The next offset of each partition.
    pub offsets: Vec<Record>,
    pub complete_until: Option<Micros>,
    pub watermark: Option<Micros>,
}

/// Offsets and time up to which both sides can be compared.
pub struct Common {
    pub below: Vec<Record>,
    pub until: Option<Micros>,
}

impl Verifier<'_> {
    /// `None`: the table belongs to another state.
    async fn committed(&self, location: &str, sink: &str, manifest: &Manifest) -> Result<Option<Committed>> {
        let app = format!("{}/{sink}", self.request.name);
        let mut applications = vec![app.clone(), format!("{app}/complete_until"), format!("{app}/watermark")];
        let places = self.places(manifest);
        applications.extend(places.iter().map(|(topic, p)| format!("{app}/offset/{topic}/{p}")));
        let found = progress(location, &applications).await?;
        if found.state_id.as_deref() != Some(manifest.state_id.to_string().as_str()) {
            return Ok(None);
        }
        let offsets = places.into_iter().zip(&found.applications[3..]);
        Ok(Some(Committed {
            version: found.version,
            epoch: found.applications[0],
            offsets: offsets.filter_map(|((topic, p), next)| Some((topic, p, (*next)?))).collect(),
            complete_until: found.applications[1],
            watermark: found.applications[2],
        }))
    }

    /// Topic and partition of all that the state has read.
    fn places(&self, manifest: &Manifest) -> Vec<(String, i32)> {
        let Some(source) = manifest.sources.get(&self.source.name) else { return Vec::new() };
        let place = |p: &crate::state::manifest::PartitionProgress| {
            Some((source.topics.get(usize::from(p.topic))?.clone(), p.partition))
        };
        source.partitions.iter().filter_map(place).collect()
    }

    /// The table pinned, and then the state, so that it names all that the table leaves out.
    pub async fn pinned(&self, location: &str, sink: &str) -> Result<(Committed, State)> {
        let before = open(self.request.state).await?;
        let committed = self.committed(location, sink, &before.manifest).await?;
        let committed = committed.ok_or_else(|| {
            Error::user(format!("the table of {sink} at {location} belongs to another state"))
                .hint("Give the state that wrote it with --state, and the pipeline's name with --name.")
        })?;
        Ok((committed, open(self.request.state).await?))
    }

    /// The backup as it is now, once it has what the sink has, and the state after it. `None`: a history whose rows do
    /// not say which record they come from.
    pub async fn backup_version(
        &self,
        sink: &Committed,
        report: &mut Report,
    ) -> Result<(Option<Committed>, State)> {
        let request = self.request;
        let own = match backup_of(request.catalog, request.plan, self.source)? {
            Backup::Delta(location) => request.plan.sinks().find_map(|(_, sink)| match &sink.kind {
                SinkKind::Delta(config) if config.location == location => Some((sink, location.clone())),
                _ => None,
            }),
            Backup::Table(_) => None,
        };
        let Some((own, location)) = own else {
            report.cannot_prove(
                "which rows the stream had: the history is a table without offsets of its own, so late rows and dead letters count in the answer",
            );
            return Ok((None, open(request.state).await?));
        };
        if own.schema.column_with_name("_offset").is_none() {
            let message = format!("the backup {} does not say which record a row comes from", own.name);
            return Err(Error::user(message).hint(
                "Store the metadata columns: leave metadata = 'none' out and write to a new location.",
            ));
        }
        let mut found = None;
        for pause in PAUSES {
            tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
            let before = open(request.state).await?;
            let backup = match self.committed(&location, &own.name, &before.manifest).await? {
                Some(backup) => backup,
                None => self.foreign(&location, report).await?,
            };
            let caught_up = behind(&backup, sink).is_none();
            found = Some((backup, open(request.state).await?));
            if caught_up {
                break;
            }
        }
        let (backup, state) = found.ok_or_else(|| Error::internal("no look at the backup"))?;
        Ok((Some(backup), state))
    }

    /// A backup that another pipeline writes: it reaches as far as its rows.
    async fn foreign(&self, location: &str, report: &mut Report) -> Result<Committed> {
        report.cannot_prove("that the backup is whole: another pipeline writes it, and its replays count");
        let version = progress(location, &[]).await?.version;
        let session = batch_session_within(self.request.memory)?;
        session.register_table("__backup", provider_as_of(location, AsOf::Version(version)).await?)?;
        let sql = "SELECT CAST(_topic AS VARCHAR), CAST(_partition AS BIGINT), max(_offset) + 1
            FROM __backup WHERE _offset IS NOT NULL GROUP BY _topic, _partition";
        let mut offsets = Vec::new();
        for batch in session.sql(sql).await?.collect().await? {
            let topics = batch.column(0).as_string::<i32>();
            let number = |at: usize, row: usize| batch.column(at).as_primitive::<Int64Type>().value(row);
            for row in (0..batch.num_rows()).filter(|row| topics.is_valid(*row)) {
                let partition = i32::try_from(number(1, row)).unwrap_or(-1);
                offsets.push((topics.value(row).to_owned(), partition, number(2, row)));
            }
        }
        Ok(Committed { version, offsets, ..Committed::default() })
    }

    pub fn common(
        &self,
        sink: &Committed,
        backup: Option<&Committed>,
        until: Option<Micros>,
        report: &mut Report,
    ) -> Result<Common> {
        let all = Common { below: sink.offsets.clone(), until };
        let Some(backup) = backup else { return Ok(all) };
        let Some((topic, partition)) = behind(backup, sink) else { return Ok(all) };
        let reach = self.request.plan.reach(self.id);
        let (Some(until), Some(reach), Some(watermark)) = (until, reach, backup.watermark) else {
            let message = format!(
                "the backup has not yet what {} has committed of {topic}, partition {partition}",
                self.sink.name
            );
            return Err(Error::external(message).hint("Try again when the backup has caught up."));
        };
        report.cannot_prove(format!(
            "the newest rows: the backup has not yet what the sink has committed of {topic}, partition {partition}"
        ));
        let until = until.min(watermark.saturating_sub(reach.back));
        Ok(Common { below: backup.offsets.clone(), until: Some(until) })
    }

    /// The offsets that the state of the view was built from: late rows below count in it.
    pub fn born(&self, manifest: &Manifest) -> Vec<Record> {
        let plan = self.request.plan;
        let births = super::chain(plan, self.id).into_iter().filter_map(|id| {
            let born = manifest.nodes.get(&plan.nodes[id].id)?.birth.get(&self.source.name)?;
            Some(born).filter(|born| !born.is_empty())
        });
        let topics = manifest.sources.get(&self.source.name).map(|source| source.topics.as_slice());
        let topic = |at: u16| topics.and_then(|topics| topics.get(usize::from(at))).cloned();
        let place = |p: &crate::state::manifest::PartitionProgress| {
            Some((topic(p.topic)?, p.partition, p.next_offset))
        };
        births.take(1).flatten().filter_map(place).collect()
    }

    /// SQL that means something else than what the state was written with.
    pub fn changed_sql(&self, manifest: &Manifest, report: &mut Report) {
        let plan = self.request.plan;
        let compared = plan.compare(&manifest.fingerprints, &|_, _| false);
        // A node is known by its view and its place in it, a sink by its name.
        let view = |id: &str| id.rsplit_once('.').map_or(id, |(view, _)| view).to_owned();
        let below: Vec<String> =
            super::chain(plan, self.id).into_iter().map(|id| view(&plan.nodes[id].id)).collect();
        let concerns = |name: &str| below.iter().any(|view| view == name);
        for item in compared.items.iter().filter(|item| item.is_changed() && concerns(&item.name)) {
            report.cannot_prove(format!(
                "anything of {}: its SQL differs from that of the state, see `millstream plan`",
                item.name
            ));
        }
    }
}

/// A partition of which the backup has not what the sink has.
fn behind(backup: &Committed, sink: &Committed) -> Option<(String, i32)> {
    let next = |(topic, partition): (&String, i32)| {
        let of = backup.offsets.iter().find(|(t, p, _)| t == topic && *p == partition);
        of.map_or(0, |(_, _, next)| *next)
    };
    let behind = |(topic, partition, at): &&Record| next((topic, *partition)) < *at;
    sink.offsets.iter().find(behind).map(|(topic, partition, _)| (topic.clone(), *partition))
}
