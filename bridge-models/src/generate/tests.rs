use burn_flex::Flex;

use super::*;
use crate::families::llama::presets;
use crate::{Init, RandomInit};

fn model() -> Decoder<Flex> {
    let config = presets::tiny();
    // Large weights, so that the likeliest token changes from step to step.
    let init = Init {
        std: Some(0.3),
        ..Init::default()
    };
    Decoder::build(
        config.clone(),
        &mut RandomInit::new(&init, &config),
        &Default::default(),
    )
    .unwrap()
}

fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens,
        ..GenerateOptions::default()
    }
}

#[test]
fn cached_and_uncached_texts_are_equal() {
    let model = model();
    for prompt in [&[7][..], &[1, 2, 3, 4, 5], &[130; 40]] {
        let cached = generate(&model, prompt, &greedy(24)).unwrap();
        let uncached = generate(
            &model,
            prompt,
            &GenerateOptions {
                use_cache: false,
                ..greedy(24)
            },
        )
        .unwrap();
        assert_eq!(cached.token_ids, uncached.token_ids);
        assert_eq!(
            (cached.token_ids.len(), cached.finish),
            (24, Finish::MaxNewTokens)
        );
        let distinct: std::collections::HashSet<_> = cached.token_ids.iter().collect();
        assert!(
            distinct.len() > 3,
            "a text of one token proves little: {:?}",
            cached.token_ids
        );
    }
}

#[test]
fn a_text_ends_at_a_stop_token_or_on_request() {
    let model = model();
    let full = generate(&model, &[3, 1, 4], &greedy(16)).unwrap().token_ids;
    let stop = full[9];
    let first = full.iter().position(|token| *token == stop).unwrap();
    let stopped = generate(
        &model,
        &[3, 1, 4],
        &GenerateOptions {
            stop_ids: vec![stop],
            ..greedy(16)
        },
    )
    .unwrap();
    assert_eq!(
        (stopped.token_ids.as_slice(), stopped.finish),
        (&full[..=first], Finish::StopToken)
    );

    let mut seen = Vec::new();
    let broken = generate_streaming(&model, &[3, 1, 4], &greedy(16), &mut |token| {
        seen.push(token);
        if seen.len() == 5 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let broken = broken.unwrap();
    assert_eq!(
        (broken.token_ids.as_slice(), broken.finish),
        (&full[..5], Finish::Callback)
    );
    assert_eq!(seen, full[..5]);
    assert!(
        generate(&model, &[3, 1, 4], &greedy(0))
            .unwrap()
            .token_ids
            .is_empty()
    );
}

#[test]
fn the_context_bounds_prompt_and_text() {
    let model = model();
    let context = model.context_length();
    assert_eq!(context, 96);
    let text = generate(&model, &vec![5; context - 3], &greedy(50)).unwrap();
    assert_eq!(
        (text.token_ids.len(), text.finish),
        (3, Finish::ContextFull)
    );

    let error = generate(&model, &vec![5; context], &greedy(1)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::PromptTooLong {
                prompt: 96,
                context: 96
            }
        ),
        "{error}"
    );
    assert!(error.is_input());
    assert!(matches!(
        generate(&model, &[], &greedy(1)).unwrap_err(),
        Error::EmptyPrompt
    ));
    let error = generate(&model, &[1, 131], &greedy(1)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TokenOutOfVocabulary {
                id: 131,
                position: 1,
                vocab_size: 131
            }
        ),
        "{error}"
    );
}

#[test]
fn random_texts_repeat_by_seed() {
    let model = model();
    let text = |seed| {
        let sampling = Sampling::Random {
            temperature: 1.0,
            top_k: Some(40),
            top_p: Some(0.95),
            seed,
        };
        generate(
            &model,
            &[9, 8],
            &GenerateOptions {
                sampling,
                ..greedy(20)
            },
        )
        .unwrap()
        .token_ids
    };
    assert_eq!(text(1), text(1));
    assert_ne!(text(1), text(2));
}

#[test]
fn damaged_weights_are_an_error_not_a_token() {
    let model = model();
    let norm = model
        .params()
        .into_iter()
        .find(|param| param.name() == "final_norm.weight")
        .unwrap();
    norm.set_value(bridge_ops::float_from_f32::<Flex>(
        &[f32::NAN; 48],
        &[48],
        &Default::default(),
    ));
    let error = generate(&model, &[1, 2], &greedy(3)).unwrap_err();
    assert!(
        matches!(error, Error::NonFiniteLogits { position: 1, .. }),
        "{error}"
    );
    assert!(!error.is_input());
}
