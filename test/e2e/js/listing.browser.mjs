import assert from 'node:assert/strict'
import { inEachForm } from './browser.mjs'

const follow = async (page, name) => {
  await page.getByRole('link', { name, exact: true }).click()
  await page.waitForLoadState()
}

inEachForm('listing', 'links lead down to the file and back', async (page, address) => {
  await page.goto(address)
  const trail = [page.url()]
  for (const name of ['a b/', 'semi;colon/', '100%/', 'x;y?z#.txt']) {
    await follow(page, name)
    trail.push(page.url())
  }
  const directories = ['', 'a%20b/', 'a%20b/semi%3Bcolon/', 'a%20b/semi%3Bcolon/100%25/'].map((path) => address + path)
  assert.deepEqual(trail, [...directories, `${directories.at(-1)}x%3By%3Fz%23.txt`])
  assert.equal(await page.textContent('body'), 'inside\n')
  for (const want of directories.toReversed()) {
    await page.goBack()
    assert.equal(page.url(), want)
    assert.match(await page.textContent('h1'), /^Directory listing for/)
  }
})

inEachForm('listing', 'directories are found without their slash', async (page, address) => {
  await page.goto(`${address}a%20b?q=1`)
  assert.equal(page.url(), `${address}a%20b/?q=1`)
  await page.goto(`${address}a%20b/semi;colon`)
  assert.equal(page.url(), `${address}a%20b/semi;colon/`)
  await follow(page, '100%/')
  assert.equal(page.url(), `${address}a%20b/semi;colon/100%25/`)
})

inEachForm('listing', 'what is not there says so', async (page, address) => {
  const response = await page.goto(`${address}a%20b/missing`)
  assert.equal(response.status(), 404)
  assert.match(await page.textContent('body'), /File not found/)
})
