import assert from 'node:assert/strict'
import { Sandbox } from 'e2b'
import { inEachForm } from './browser.mjs'

const sandbox = await Sandbox.connect(process.env.SANDBOX_ID)
const source = 'next/pages/index.js'
const original = await sandbox.files.read(source)

inEachForm('next', 'an edited page changes in the browser and keeps its state', async (page, address, diary) => {
  await sandbox.files.write(source, original)
  await page.goto(address)
  await page.getByRole('heading', { name: 'first text' }).waitFor()
  const button = page.getByRole('button', { name: 'pressed' })
  await button.click() // does nothing before the page's scripts run
  await page.getByText('pressed 1').waitFor()
  const loads = diary.loads

  for (const text of ['second text', 'third text']) {
    await sandbox.files.write(source, original.replace('first text', text))
    await page.getByRole('heading', { name: text }).waitFor()
  }
  assert.equal(await button.textContent(), 'pressed 1')
  assert.equal(diary.loads, loads, 'the page was loaded again')
})
