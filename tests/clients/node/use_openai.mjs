// openai-node's usual program: chats, streams, parsed output, tools, responses, embeddings, files, batches.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import OpenAI, { toFile } from 'openai';
import { standardResponseFormat, standardTextFormat } from 'openai/helpers/standard-schema';

const client = new OpenAI({ baseURL: `${process.env.MANYLORA_URL}/v1`, apiKey: 'none' });
const TABLE = 'crew\nname | age | city\nAda | 36 | London\nLeo | 52 | Rome\nYuki | 29 | Tokyo\n\n';
const QUESTION = `${TABLE}Which city does Ada have?`;
const SQL = "SELECT city FROM crew WHERE name = 'Ada';";
const messages = [{ role: 'user', content: QUESTION }];
const PERSON = {
  type: 'object',
  properties: { name: { type: 'string' }, city: { type: 'string' } },
  required: ['name', 'city'],
  additionalProperties: false,
};
// What zod, valibot and arktype are to the client: a schema and a check.
const person = {
  '~standard': {
    version: 1,
    vendor: 'own',
    validate: (value) => (typeof value.city === 'string' ? { value } : { issues: [{ message: 'no city' }] }),
    jsonSchema: { input: () => PERSON },
  },
};
const NAMES = { type: 'object', properties: { name: { enum: ['Ada', 'Leo', 'Yuki'] } }, required: ['name'] };

test('the page', () => {
  const page = readFileSync(new URL('../../../docs/clients.md', import.meta.url), 'utf8');
  const code = page.split('```js\n')[1].split('```')[0].replace('http://127.0.0.1:8000', process.env.MANYLORA_URL);
  const program = `const QUESTION = ${JSON.stringify(QUESTION)};\n${code}`;
  const cwd = new URL('.', import.meta.url);
  const printed = execFileSync(process.execPath, ['--input-type=module', '-e', program], { cwd });
  assert.equal(printed.toString().trim(), SQL);
});

test('models', async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.ok(ids.includes('sql'));
  assert.equal((await client.models.retrieve('sql')).id, 'sql');
});

test('a chat', async () => {
  const { data, request_id } = await client.chat.completions
    .create({ model: 'sql', messages, temperature: 0 })
    .withResponse();
  assert.equal(data.choices[0].message.content, SQL);
  assert.ok(request_id);
});

test('a streamed chat', async () => {
  const fields = { model: 'sql', messages, temperature: 0, stream_options: { include_usage: true } };
  let text = '';
  for await (const chunk of await client.chat.completions.create({ ...fields, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? '';
  }
  assert.equal(text, SQL);
  const stream = client.chat.completions.stream(fields);
  assert.equal(await stream.finalContent(), SQL);
  assert.ok((await stream.totalUsage()).completion_tokens > 0);
});

test('parsed output', async () => {
  const fields = { model: 'json', messages, temperature: 0 };
  const response_format = standardResponseFormat(person, 'person');
  const answer = await client.chat.completions.parse({ ...fields, response_format });
  assert.deepEqual(answer.choices[0].message.parsed, { name: 'Ada', city: 'London' });
  const plain = { type: 'json_schema', json_schema: { name: 'person', schema: PERSON, strict: true } };
  const raw = await client.chat.completions.create({ ...fields, response_format: plain });
  assert.equal(JSON.parse(raw.choices[0].message.content).city, 'London');
  const response = await client.responses.parse({
    model: 'json',
    input: QUESTION,
    temperature: 0,
    text: { format: standardTextFormat(person, 'person') },
  });
  assert.deepEqual(response.output_parsed, { name: 'Ada', city: 'London' });
});

const get_city = ({ name }) => {
  assert.ok(NAMES.properties.name.enum.includes(name));
  return 'London';
};
const tools = [
  {
    type: 'function',
    function: { name: 'get_city', description: 'Tell a city.', parameters: NAMES, parse: JSON.parse, function: get_city },
  },
];
const lookUp = {
  model: 'tools',
  messages: [{ role: 'user', content: 'Which city does Ada have?' }],
  temperature: 0,
  tools,
};

test('a tool by its name', async () => {
  const tool_choice = { type: 'function', function: { name: 'get_city' } };
  for (const stream of [false, true]) {
    const runner = client.chat.completions.runTools({ ...lookUp, stream, tool_choice });
    assert.equal(await runner.finalFunctionToolCallResult(), 'London');
  }
});

test('a loop of tools', async () => {
  for (const stream of [false, true]) {
    const runner = client.chat.completions.runTools({ ...lookUp, stream });
    assert.equal(await runner.finalContent(), 'The city of Ada is London.');
    assert.equal(await runner.finalFunctionToolCallResult(), 'London');
  }
});

test('responses', async () => {
  const response = await client.responses.create({ model: 'sql', input: QUESTION, temperature: 0 });
  assert.equal(response.output_text, SQL);
  const stream = client.responses.stream({ model: 'sql', input: QUESTION, temperature: 0 });
  let text = '';
  for await (const event of stream) if (event.type === 'response.output_text.delta') text += event.delta;
  assert.equal(text, SQL);
  assert.equal((await stream.finalResponse()).output_text, SQL);
  const called = await client.responses.create({
    model: 'tools',
    input: QUESTION,
    temperature: 0,
    tools: [{ type: 'function', name: 'get_city', parameters: NAMES, strict: false }],
    tool_choice: { type: 'function', name: 'get_city' },
  });
  assert.equal(called.output[0].name, 'get_city');
});

test('completions', async () => {
  const prompt = `<|im_start|>user\n${QUESTION}<|im_end|>\n<|im_start|>assistant\n`;
  const answer = await client.completions.create({ model: 'sql', prompt, max_tokens: 40, temperature: 0 });
  assert.equal(answer.choices[0].text, SQL);
});

test('embeddings', async () => {
  const answer = await client.embeddings.create({ model: 'sql', input: ['Ada', 'Leo'] });
  assert.deepEqual(answer.data.map((each) => each.embedding.length), [128, 128]);
  const floats = await client.embeddings.create({ model: 'sql', input: ['Ada'], encoding_format: 'float' });
  assert.ok(Math.abs(floats.data[0].embedding[0] - answer.data[0].embedding[0]) < 1e-3);
});

test('files and batches', async () => {
  const line = (id) =>
    JSON.stringify({
      custom_id: id,
      method: 'POST',
      url: '/v1/chat/completions',
      body: { model: 'sql', messages, temperature: 0 },
    });
  const content = await toFile(Buffer.from(`${line('one')}\n${line('two')}\n`), 'ask.jsonl');
  const file = await client.files.create({ file: content, purpose: 'batch' });
  let batch = await client.batches.create({
    input_file_id: file.id,
    endpoint: '/v1/chat/completions',
    completion_window: '24h',
  });
  while (!['completed', 'failed', 'expired', 'cancelled'].includes(batch.status)) {
    await new Promise((done) => setTimeout(done, 20));
    batch = await client.batches.retrieve(batch.id);
  }
  assert.equal(batch.status, 'completed');
  const lines = (await (await client.files.content(batch.output_file_id)).text()).trim().split('\n');
  const answers = lines.map((each) => JSON.parse(each));
  assert.deepEqual(answers.map((each) => each.custom_id).sort(), ['one', 'two']);
  assert.equal(answers[0].response.body.choices[0].message.content, SQL);
  assert.ok((await client.files.delete(file.id)).deleted);
  const ids = [];
  for await (const each of client.batches.list({ limit: 1 })) ids.push(each.id);
  assert.ok(ids.includes(batch.id));
});

test('errors', async () => {
  await assert.rejects(client.chat.completions.create({ model: 'nobody', messages }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ model: 'sql', messages, top_p: 7 }), OpenAI.BadRequestError);
});
