//! Asks the broker now and then, by a client of its own, what partitions there are and where they end. Partitions that
//! are added to a topic while the pipeline runs are read from their beginning; ends show a client that gets no more
//! records ([`super::standstill`]).
//!
//! The shard that gets one takes it in between two polls, so that the next manifest has its position; after a restart it is
//! an old acquaintance. A partition that is added while the pipeline stands still is found by its start.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::WeakSender;

use crate::connectors::{PartitionInfo, SourceConnector};
use crate::runtime::report::Command;
use crate::stream::Place;

/// The shard that reads a partition.
pub fn shard_of(place: Place, shards: usize) -> usize {
    place.partition() as usize % shards
}

pub struct Discovery {
    pub source: Arc<dyn SourceConnector>,
    pub every: Duration,
    pub known: BTreeSet<Place>,
    /// Of the source's shards, which end without us.
    pub commands: Vec<WeakSender<Command>>,
}

impl Discovery {
    /// Runs until the source has ended, or a little longer. A broker that does not answer is asked again later.
    pub async fn run(mut self) {
        loop {
            tokio::time::sleep(self.every).await;
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
            self.tell_ends(&partitions);
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

    /// A shard that has not taken its last commands gets no more: it is at work.
    fn tell_ends(&self, partitions: &[PartitionInfo]) {
        let shards = self.commands.len();
        for (shard, command) in self.commands.iter().enumerate() {
            let place = |found: &PartitionInfo| Place::new(0, found.topic, found.partition);
            let ends = partitions.iter().map(|found| (place(found), found.high));
            let ends = ends.filter(|(place, _)| shard_of(*place, shards) == shard).collect();
            if let Some(command) = command.upgrade() {
                command.try_send(Command::Ends(ends)).ok();
            }
        }
    }
}
