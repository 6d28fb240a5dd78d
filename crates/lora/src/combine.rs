//! Several adapters as one, by stacking ranks.

use std::collections::BTreeMap;

use crate::{LoraFile, LoraModule};

impl LoraFile {
    /// One adapter that adds what all of these add, each times its own strength.
    ///
    /// Ranks add up; the strengths go into `B`, so that the result has `alpha = rank`. Metadata is not carried over.
    ///
    /// # Panics
    ///
    /// If two adapters disagree on a module's widths: they were read for different models.
    pub fn combine(files: &[(&Self, f32)]) -> Self {
        let mut stacks: BTreeMap<&str, Vec<(&LoraModule, f32)>> = BTreeMap::new();
        for (file, strength) in files {
            for (path, module) in &file.modules {
                stacks.entry(path).or_default().push((module, *strength));
            }
        }
        let modules = stacks
            .into_iter()
            .map(|(path, stack)| (path.to_owned(), combine_modules(path, &stack)))
            .collect();
        Self::new(modules, BTreeMap::new())
    }
}

fn combine_modules(path: &str, stack: &[(&LoraModule, f32)]) -> LoraModule {
    let (first, _) = stack[0];
    let (in_features, out_features) = (first.in_features, first.out_features);
    for (module, _) in stack {
        let widths = (module.in_features, module.out_features);
        assert_eq!(
            widths,
            (in_features, out_features),
            "widths of `{path}` in two adapters"
        );
    }
    let rank: usize = stack.iter().map(|(module, _)| module.rank).sum();
    let a = stack
        .iter()
        .flat_map(|(module, _)| &module.a)
        .copied()
        .collect();
    let mut b = Vec::with_capacity(out_features * rank);
    for row in 0..out_features {
        for (module, strength) in stack {
            let factor = strength * module.scale();
            b.extend(
                module.b[row * module.rank..(row + 1) * module.rank]
                    .iter()
                    .map(|value| value * factor),
            );
        }
    }
    LoraModule::new(rank as f32, in_features, out_features, a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, module: LoraModule) -> LoraFile {
        LoraFile::new(BTreeMap::from([(path.to_owned(), module)]), BTreeMap::new())
    }

    #[test]
    fn the_combined_addition_is_the_weighted_sum() {
        let first = file(
            "q",
            LoraModule::new(2.0, 2, 2, vec![1.0, 2.0], vec![3.0, 4.0]),
        );
        let second = file(
            "q",
            LoraModule::new(
                1.0,
                2,
                2,
                vec![1.0, 0.0, 0.0, 1.0],
                vec![1.0, 2.0, 3.0, 4.0],
            ),
        );
        let combined = LoraFile::combine(&[(&first, 0.5), (&second, -2.0)]);
        let module = &combined.modules["q"];
        assert_eq!((module.rank, module.alpha), (3, 3.0));
        let expected: Vec<f32> = first.modules["q"]
            .delta()
            .iter()
            .zip(second.modules["q"].delta())
            .map(|(x, y)| 0.5 * x - 2.0 * y)
            .collect();
        assert_eq!(module.delta(), expected);
    }

    #[test]
    fn modules_of_one_adapter_alone_are_carried_over() {
        let first = file("q", LoraModule::new(1.0, 1, 1, vec![1.0], vec![3.0]));
        let second = file("k", LoraModule::new(1.0, 1, 1, vec![1.0], vec![5.0]));
        let combined = LoraFile::combine(&[(&first, 1.0), (&second, 2.0)]);
        assert_eq!(combined.modules["q"].delta(), [3.0]);
        assert_eq!(combined.modules["k"].delta(), [10.0]);
    }
}
