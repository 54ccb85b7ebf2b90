"""Model hubs: ``hf://`` locators and the API of Hugging Face."""
