//! Learning a vocabulary from text.

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerBuilder,
};

use crate::byte_level;
use crate::chat::ChatTemplate;
use crate::error::{Result, TokenizerError};
use crate::folder::Named;
use crate::tokenizer::{Model, Tokenizer};

pub(crate) fn train_bpe<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    vocab_size: usize,
) -> Result<Tokenizer> {
    let special = byte_level::SPECIAL.len();
    let bad = |reason: String| TokenizerError::BadTraining { vocab_size, reason };
    if !(byte_level::VOCAB_SIZE..=1 << 24).contains(&vocab_size) {
        return Err(bad(format!(
            "it must lie between {} (256 bytes and {special} special tokens) and 16777216",
            byte_level::VOCAB_SIZE
        )));
    }
    let failed = |error: tokenizers::Error| TokenizerError::Failed {
        action: "train a vocabulary",
        reason: error.to_string(),
    };

    let split = ByteLevel::new(false, false, true);
    let mut trained =
        TokenizerBuilder::<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(split))
            .with_decoder(Some(split))
            .build()
            .map_err(failed)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size - special)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet((0..=255).map(byte_level::byte_symbol).collect())
        .build();
    trained.train(&mut trainer, texts).map_err(failed)?;
    let learnt = trained.get_vocab_size(false);
    if learnt + special < vocab_size {
        return Err(bad(format!(
            "the text yields {} tokens; give more text or ask for fewer",
            learnt + special
        )));
    }

    let mut inner = tokenizers::Tokenizer::new(trained.get_model().clone());
    inner
        .with_pre_tokenizer(Some(PreTokenizerWrapper::from(split)))
        .with_decoder(Some(DecoderWrapper::from(split)))
        .with_post_processor(None::<PostProcessorWrapper>);
    inner.add_special_tokens(&byte_level::SPECIAL.map(|token| AddedToken::from(token, true)));

    let id = |token: &str| inner.token_to_id(token).map(|id| (token.to_owned(), id));
    let named = Named {
        bos: id(byte_level::END_OF_TEXT),
        eos: id(byte_level::END_OF_TEXT),
        pad: id(byte_level::PAD),
        unk: None,
    };
    let mut tokenizer = Tokenizer::assemble(Model::HuggingFace(Box::new(inner)), named);
    tokenizer.templates = vec![(
        "default".into(),
        ChatTemplate::built_in(byte_level::CHAT_TEMPLATE),
    )];
    Ok(tokenizer)
}
