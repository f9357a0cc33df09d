//! Asks the broker now and then, by a client of its own, what partitions there are and where they end. Partitions that
//! are added to a topic while the pipeline runs are read from their beginning; ends show a client that gets no more
//! records ([`super::standstill`]), and in between, more often, that the broker is there ([`super::silence`]). A topic that
//! took the place of the one that is read ends the pipeline.
//!
//! The shard that gets one takes it in between two polls, so that the next manifest has its position; after a restart it is
//! an old acquaintance. A partition that is added while the pipeline stands still is found by its start.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::WeakSender;

use crate::connectors::{PartitionInfo, SourceConnector};
use crate::error::Error;
use crate::runtime::report::{Command, Ends, Report};
use crate::runtime::start::another;
use crate::stream::Place;
use crate::stream::clock::Clock;

/// The shard that reads a partition.
pub fn shard_of(place: Place, shards: usize) -> usize {
    place.partition() as usize % shards
}

pub struct Discovery {
    pub source: Arc<dyn SourceConnector>,
    pub every: Duration,
    /// How often ends are asked for, no less than that.
    pub pulse: Duration,
    pub known: BTreeSet<Place>,
    /// Of the source's shards, which end without us.
    pub commands: Vec<WeakSender<Command>>,
    /// Of the topic that is read, if it is known.
    pub identity: Option<String>,
    pub reports: WeakSender<Report>,
}

impl Discovery {
    /// Runs until the source has ended, or a little longer. A broker that does not answer is asked again later.
    pub async fn run(mut self) {
        let mut looked_at = Clock.instant();
        loop {
            tokio::time::sleep(self.pulse).await;
            let is_full = Clock.instant() - looked_at + self.pulse / 2 >= self.every;
            if self.commands.iter().all(|command| command.upgrade().is_none()) {
                return;
            }
            let partitions = match self.source.partitions().await {
                Ok(partitions) => partitions,
                Err(error) => {
                    tracing::debug!(%error, "partitions could not be looked for");
                    continue;
                }
            };
            self.tell_ends(&partitions, is_full);
            if !is_full {
                continue;
            }
            looked_at = Clock.instant();
            if let Some(error) = self.replaced().await {
                if let Some(reports) = self.reports.upgrade() {
                    reports.send(Report::Failed(error)).await.ok();
                }
                return;
            }
            for found in partitions {
                let place = Place::new(0, found.topic, found.partition);
                if self.known.contains(&place) {
                    continue;
                }
                let Some(command) = self.commands[shard_of(place, self.commands.len())].upgrade() else {
                    return;
                };
                tracing::warn!(
                    partition = found.partition,
                    from = found.low,
                    "a partition was added to the topic"
                );
                if command.send(Command::Add { place, next: found.low }).await.is_err() {
                    return;
                }
                self.known.insert(place);
            }
        }
    }

    async fn replaced(&self) -> Option<Error> {
        let before = self.identity.as_deref()?;
        let now = self.source.identity().await.filter(|now| now != before)?;
        Some(another(self.source.as_ref(), before, &now))
    }

    /// A shard that has not taken its last commands gets no more: it is at work.
    fn tell_ends(&self, partitions: &[PartitionInfo], is_full: bool) {
        let (shards, at) = (self.commands.len(), Clock.instant());
        for (shard, command) in self.commands.iter().enumerate() {
            let place = |found: &PartitionInfo| Place::new(0, found.topic, found.partition);
            let ends = partitions.iter().map(|found| (place(found), found.high));
            let ends = ends.filter(|(place, _)| shard_of(*place, shards) == shard).collect();
            if let Some(command) = command.upgrade() {
                command.try_send(Command::Ends(Ends { ends, at, is_full })).ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use arrow::datatypes::{Schema, SchemaRef};
    use async_trait::async_trait;
    use tokio::sync::mpsc::channel;

    use super::*;
    use crate::connectors::SourceReader;
    use crate::error::Result;
    use crate::stream::Positions;

    /// Says another id from the third time on; nothing in between.
    struct Replaced(AtomicUsize);

    #[async_trait]
    impl SourceConnector for Replaced {
        fn topics(&self) -> Vec<Arc<str>> {
            vec!["t".into()]
        }

        fn schema(&self) -> SchemaRef {
            Arc::new(Schema::empty())
        }

        async fn partitions(&self) -> Result<Vec<PartitionInfo>> {
            Ok(Vec::new())
        }

        async fn identity(&self) -> Option<String> {
            let ids = [Some("a"), None, Some("b")];
            ids[self.0.fetch_add(1, Ordering::SeqCst).min(2)].map(str::to_owned)
        }

        async fn start_positions(&self, _: &[PartitionInfo]) -> Result<Positions> {
            Ok(Positions::default())
        }

        async fn reader(&self, _: Positions) -> Result<Box<dyn SourceReader>> {
            Err(Error::internal("nothing is read"))
        }
    }

    #[tokio::test]
    async fn a_topic_that_was_replaced_ends_the_pipeline() {
        let source = Arc::new(Replaced(AtomicUsize::new(0)));
        let (command, _commands) = channel(4);
        let (report, mut reports) = channel(4);
        let discovery = Discovery {
            source: source.clone(),
            every: Duration::from_millis(1),
            pulse: Duration::from_millis(1),
            known: BTreeSet::new(),
            commands: vec![command.downgrade()],
            identity: Some("a".to_owned()),
            reports: report.downgrade(),
        };
        discovery.run().await;
        assert_eq!(source.0.load(Ordering::SeqCst), 3, "an id that is not known is no other one");
        let Ok(Report::Failed(error)) = reports.try_recv() else { panic!("the pipeline goes on") };
        assert!(error.message().contains("id is a, this one's is b"), "{error}");
        assert!(error.is_lasting() && error.hint_text().unwrap().contains("--allow-gap"));
    }
}
