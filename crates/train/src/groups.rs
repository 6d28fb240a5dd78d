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

/// All batches of a run, in groups of an optimiser step each. What a group holds is a function of its number.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    data: &'a TrainingData,
    /// Batches of a group, and samples of a batch.
    num_batches: u64,
    batch: usize,
}

impl<'a> Groups<'a> {
    /// Those of a recipe, with `at_once` micro-batches in each batch ([`engine::TrainingEngine::at_once`]).
    ///
    /// # Panics
    ///
    /// If the recipe's accumulation is no multiple of that.
    pub fn new(data: &'a TrainingData, recipe: &TrainRecipe, at_once: usize) -> Self {
        let accumulation = recipe.accumulation as usize;
        assert!(
            accumulation.is_multiple_of(at_once),
            "{at_once} of {accumulation} micro-batches at once"
        );
        Self {
            data,
            num_batches: (accumulation / at_once) as u64,
            batch: recipe.micro_batch as usize * at_once,
        }
    }

    /// Group `index`, counted from 0.
    ///
    /// # Errors
    ///
    /// If a latent or an embedding cannot be read, or is not finite.
    pub fn get(&self, index: u64) -> Group {
        let first = index * self.num_batches;
        (first..first + self.num_batches)
            .map(|place| self.data.batch(place * self.batch as u64, self.batch))
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
