//! The micro-batches of one optimiser step after the other; the next step's are read and drawn while a step is taken.
//!
//! At FLUX.1-dev's sizes a step's texts are 17 MB of half floats in Parquet: without a second thread a card would wait for
//! them a third of the time.

use std::sync::mpsc::sync_channel;

use engine::MicroBatch;
use pipeline::recipe::TrainRecipe;

use crate::data::TrainingData;
use crate::error::TrainError;

/// What [`Groups`] gives for a step.
pub type Group = Result<Vec<MicroBatch>, TrainError>;

/// All micro-batches of a run, in groups of an optimiser step each. What a group holds is a function of its number.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    data: &'a TrainingData,
    accumulation: u64,
    micro_batch: usize,
}

impl<'a> Groups<'a> {
    /// Those of a recipe.
    pub fn new(data: &'a TrainingData, recipe: &TrainRecipe) -> Self {
        Self {
            data,
            accumulation: recipe.accumulation.into(),
            micro_batch: recipe.micro_batch as usize,
        }
    }

    /// Group `index`, counted from 0.
    ///
    /// # Errors
    ///
    /// If a latent or an embedding cannot be read, or is not finite.
    pub fn get(&self, index: u64) -> Group {
        let uses = self.micro_batch as u64;
        let first = index * self.accumulation;
        (first..first + self.accumulation)
            .map(|micro| self.data.batch(micro * uses, self.micro_batch))
            .collect()
    }

    /// Does `work` with a function that gives group `first`, then the one after it, and so on. While one is worked with,
    /// another thread makes the next and then waits, so that two are in memory.
    pub fn ahead<V>(self, first: u64, work: impl FnOnce(&mut dyn FnMut() -> Group) -> V) -> V {
        let (sender, receiver) = sync_channel(0);
        std::thread::scope(|scope| {
            // Ends when nobody takes any more: sending fails then.
            scope.spawn(move || (first..).all(|index| sender.send(self.get(index)).is_ok()));
            // Owned here, so that it is gone before the scope waits for the thread.
            let receiver = receiver;
            let mut next = || {
                let group = receiver.recv();
                group.expect("groups are made as long as they are taken")
            };
            work(&mut next)
        })
    }
}
