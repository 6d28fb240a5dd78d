//! Options of `sample` as changes to the recipe, so that they are checked and fingerprinted like the file.

use std::path::Path;

use pipeline::Override;
use toml::{Table, Value};

use crate::cli::SampleOptions;

/// The changes that the options stand for. Relative paths start at the current directory, not at the recipe's.
pub fn of_sample(options: &SampleOptions) -> Vec<Override> {
    let mut changes = Vec::new();
    let mut set = |field: &str, value: Value| {
        changes.push(Override::new(format!("sample.{field}"), value));
    };
    if !options.prompt.is_empty() || options.prompt_file.is_some() {
        set("prompts", options.prompt.clone().into());
        let file = options.prompt_file.as_deref().map(absolute);
        set("prompts_file", file.unwrap_or_default().into());
    }
    if let Some(text) = &options.negative_prompt {
        set("negative_prompt", text.clone().into());
    }
    if let Some(scale) = options.true_cfg {
        set("true_cfg_scale", scale.into());
    }
    if let Some(scale) = options.guidance {
        set("guidance", scale.into());
    }
    if let Some(steps) = options.steps {
        set("steps", steps.into());
    }
    if !options.seed.is_empty() {
        set("seeds", options.seed.clone().into());
    }
    if let Some(size) = options.size {
        set("width_px", size.width_px.into());
        set("height_px", size.height_px.into());
    }
    if let Some(count) = options.count {
        set("images_per_prompt", count.into());
    }
    if !options.lora.is_empty() {
        let loras: Vec<Value> = options
            .lora
            .iter()
            .map(|lora| {
                let mut fields = Table::new();
                fields.insert("path".into(), absolute(&lora.path).into());
                fields.insert("scale".into(), lora.scale.into());
                Value::Table(fields)
            })
            .collect();
        set("loras", Value::Array(loras));
    }
    if options.no_trained_lora {
        set("use_trained_lora", false.into());
        if options.lora.is_empty() {
            // The pictures are the base's own then.
            set("compare_with_base", false.into());
        }
    }
    changes
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_owned())
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod unit_tests {
    use clap::Parser;
    use pipeline::Recipe;

    use super::*;
    use crate::cli::{Cli, Command};

    fn drawn_with(arguments: &[&str]) -> Recipe {
        let line = ["cargo xtask", "sample"].iter().chain(arguments);
        let Command::Sample(options) = Cli::parse_from(line).command else {
            panic!("sample was asked for");
        };
        // Through text, as `spritelora` gets them.
        let changes: Vec<Override> = of_sample(&options)
            .iter()
            .map(|change| change.to_string().parse().expect("read back"))
            .collect();
        Recipe::parse(
            include_str!("../../configs/demo.toml"),
            Path::new("/w/configs/demo.toml"),
            &changes,
        )
        .expect("loads")
    }

    #[test]
    fn options_replace_the_recipes_values() {
        let sample = drawn_with(&[
            "--prompt",
            "a \"red\" knight",
            "--prompt=b",
            "--negative-prompt=blurry",
            "--true-cfg=2",
            "--guidance=3.5",
            "--steps=4",
            "--seed=5",
            "--seed=6",
            "--size=64x32",
            "--count=3",
            "--lora=/x/a.safetensors:0.5",
            "--no-trained-lora",
        ])
        .sample;
        assert_eq!(sample.prompts, ["a \"red\" knight", "b"]);
        assert_eq!(sample.negative_prompt, "blurry");
        assert_eq!((sample.true_cfg_scale, sample.guidance), (2.0, 3.5));
        assert_eq!((sample.steps, sample.images_per_prompt), (4, 3));
        assert_eq!(sample.seeds, [5, 6]);
        assert_eq!((sample.width_px, sample.height_px), (64, 32));
        assert_eq!(sample.loras[0].path, Path::new("/x/a.safetensors"));
        assert_eq!(sample.loras[0].scale, 0.5);
        assert!(!sample.use_trained_lora);
    }

    #[test]
    fn without_any_lora_there_is_nothing_to_compare() {
        assert!(drawn_with(&[]).sample.compare_with_base);
        assert!(!drawn_with(&["--no-trained-lora"]).sample.compare_with_base);
    }

    #[test]
    fn a_prompt_file_stands_instead_of_the_recipes_prompts() {
        let sample = drawn_with(&["--prompt-file=/p.txt"]).sample;
        assert!(sample.prompts.is_empty());
        assert_eq!(sample.prompts_file.as_deref(), Some(Path::new("/p.txt")));
    }
}
